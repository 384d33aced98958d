// One annotated file per query: nextflow run main.nf --queries 'lots/*.h5ad' --model model
// The process alone may be included elsewhere: include { CARVAE_ANNOTATE } from './main.nf'
params.queries = 'lots/*'
params.model = 'model'
params.seed = 0
params.outdir = 'annotated'

process CARVAE_ANNOTATE {
    tag "${meta.id}"
    label 'process_medium'
    container 'carvae:0.1.0'
    publishDir params.outdir, mode: 'copy'

    input:
    tuple val(meta), path(query)
    path model

    output:
    tuple val(meta), path("${meta.id}.h5ad"), emit: adata
    tuple val(meta), path("${meta.id}.cells.csv.gz"), emit: cells
    tuple val(meta), path("${meta.id}.samples.csv"), emit: samples
    tuple val(meta), path("${meta.id}.json"), emit: summary
    path 'versions.yml', emit: versions

    script:
    """
    carvae annotate '${query}' --model '${model}' --out '${meta.id}.h5ad' \\
        --threads ${task.cpus} --seed ${params.seed} --json > '${meta.id}.json'
    printf '"%s":\\n    carvae: %s\\n' '${task.process}' "\$(carvae --version)" > versions.yml
    """

    stub:
    """
    touch '${meta.id}.h5ad' '${meta.id}.samples.csv' '${meta.id}.json' versions.yml
    echo | gzip > '${meta.id}.cells.csv.gz'
    """
}

workflow {
    queries = Channel.fromPath(params.queries, type: 'any').map { file -> tuple([id: "${file.simpleName}.annotated"], file) }
    CARVAE_ANNOTATE(queries, file(params.model))
}
