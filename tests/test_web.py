"""The web page's parts that need no server: names, archives, sizes, jobs, the script."""

from __future__ import annotations

import hashlib
import io
import re
import stat
import subprocess
import tempfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from carvae.data.readers import _sample_name, open_samples
from carvae.errors import CarvaeError, ConfigError, ReadError
from carvae.web.archive import unpack
from carvae.web.job import Job, Jobs, State
from carvae.web.limits import GIB, MIB, Limits, bytes_of, size_text
from carvae.web.names import is_litter, refuse_kind, safe_path, stem
from carvae.web.script import repeat_script
from carvae.web.task import Task
from carvae.web.worker import _unpacked

SMALL = Limits(max_upload=4 * MIB, unpacked_factor=2, max_files=20)


def zipped(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


# --- names ---


@given(st.text(max_size=200))
def test_a_path_of_our_own_making_stays_in_its_folder(name: str) -> None:
    try:
        path = safe_path(name)
    except ReadError:
        return
    assert not path.is_absolute()
    assert path.parts
    for part in path.parts:
        assert part not in ("", ".", "..")
        assert not part.startswith((".", "-"))
        assert not set(part) & set("/\\\0<>\"'&;|*?$`\n\r:")
        assert len(part.encode()) <= 80


@pytest.mark.parametrize(
    "name",
    ["../a.h5ad", "a/../../b.h5", "/etc/passwd", "\\\\host\\a", "C:\\a.h5ad", "c:a", "..\\a", "a\0b", "", "x" * 2000],
)
def test_a_name_that_points_elsewhere_is_refused(name: str) -> None:
    with pytest.raises(ReadError):
        safe_path(name)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("P07 day 14.h5ad", "P07 day 14.h5ad"),
        ("GSM1/matrix.mtx.gz", "GSM1/matrix.mtx.gz"),
        ("Müller.H5AD", "Müller.h5ad"),
        ("<script>alert(1).h5", "script_alert(1).h5"),
        ("./a//b.h5", "a/b.h5"),
        (".hidden.h5", "hidden.h5"),
        ("CON", "CON"),
    ],
)
def test_what_is_left_of_a_name(name: str, path: str) -> None:
    assert str(safe_path(name)) == path


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("seurat.rds", "anndataR"),
        ("a.loom", "read_loom"),
        ("a.tar.gz", "give a .zip"),
        ("counts.xlsx", "no matrix"),
        ("a.fastq.gz", "Cell Ranger"),
        ("photo.jpeg", "not a kind of file"),
    ],
)
def test_a_file_of_another_kind_is_refused_with_the_remedy(name: str, said: str) -> None:
    with pytest.raises(ReadError, match=said) as refused:
        refuse_kind(name)
    assert name in str(refused.value)


def test_known_kinds_pass_in_any_case() -> None:
    for name in (
        "a.h5ad",
        "A.H5AD",
        "a.h5",
        "a.zip",
        "matrix.mtx.gz",
        "features.tsv",
        "filtered_contig_annotations.csv",
    ):
        refuse_kind(name)
    assert stem("x/P07.zip") == "P07"
    assert stem("matrix.mtx.gz") == "matrix"
    assert is_litter("__MACOSX/a.h5")
    assert is_litter("a/.DS_Store")
    assert not is_litter("./a.h5")


@pytest.mark.parametrize(
    ("text", "size"), [("4GB", 4 * GIB), ("500MB", 500 * MIB), ("1.5 gb", int(1.5 * GIB)), ("10k", 10240), ("7", 7)]
)
def test_sizes(text: str, size: int) -> None:
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "4 apples", "0", "1e9"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="is no size"):
        bytes_of(text)


def test_sizes_for_people() -> None:
    assert [size_text(n) for n in (12, 2048, 3 * MIB // 2, 4 * GIB)] == ["12 bytes", "2 KB", "1.5 MB", "4 GB"]


# --- archives ---


def test_an_archive_is_unpacked_without_litter(tmp_path: Path) -> None:
    members = {
        "P1/matrix.mtx": b"m" * 5000,
        "P1/features.tsv": b"f",
        "__MACOSX/P1/._matrix.mtx": b"x",
        "P1/.DS_Store": b"x",
    }
    told: list[float] = []
    unpack(zipped(tmp_path / "a.zip", members), tmp_path / "out", SMALL, told.append)
    found = {str(p.relative_to(tmp_path / "out")): p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert found == {"P1/matrix.mtx": b"m" * 5000, "P1/features.tsv": b"f"}
    assert told[-1] == 1.0


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", "..\\evil", "C:\\evil"])
def test_an_archive_that_points_out_of_its_folder_writes_nothing(tmp_path: Path, name: str) -> None:
    with pytest.raises(ReadError, match="out of its folder"):
        unpack(zipped(tmp_path / "a.zip", {"good.h5": b"g", name: b"e"}), tmp_path / "in" / "out", SMALL)
    assert [p.name for p in tmp_path.rglob("*")] == ["a.zip"]


def test_links_and_devices_in_an_archive_are_refused(tmp_path: Path) -> None:
    for kind in (stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO):
        entry = zipfile.ZipInfo("matrix.mtx")
        entry.create_system, entry.external_attr = 3, (kind | 0o777) << 16
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
            file.writestr(entry, "/etc/passwd")
        with pytest.raises(ReadError, match="link or a device"):
            unpack(tmp_path / "a.zip", tmp_path / "out", SMALL)
        assert not (tmp_path / "out").exists()


def test_bombs_are_refused(tmp_path: Path) -> None:
    zeros = bytes(3 * MIB)
    with pytest.raises(ReadError, match="200-fold"):
        unpack(zipped(tmp_path / "ratio.zip", {"a.h5": zeros}), tmp_path / "o1", SMALL)
    several = {f"{n}.h5": bytes(range(256)) * 12 * 1024 for n in range(4)}
    with pytest.raises(ReadError, match="unpacks to 12 MB, more than 8 MB"):
        unpack(zipped(tmp_path / "total.zip", several, zipfile.ZIP_STORED), tmp_path / "o2", SMALL)
    with pytest.raises(ReadError, match="21 files, more than 20"):
        unpack(zipped(tmp_path / "many.zip", {f"{n}.h5": b"" for n in range(21)}), tmp_path / "o3", SMALL)
    with pytest.raises(ReadError, match="folders deep"):
        unpack(zipped(tmp_path / "deep.zip", {"a/" * 30 + "x.h5": b"x"}), tmp_path / "o4", SMALL)


def test_an_archive_that_understates_its_sizes_is_refused(tmp_path: Path) -> None:
    packed = zipped(tmp_path / "a.zip", {"a.h5": bytes(MIB // 2)}).read_bytes()
    lie = packed.replace((MIB // 2).to_bytes(4, "little"), (100).to_bytes(4, "little"))
    assert lie != packed
    (tmp_path / "lie.zip").write_bytes(lie)
    with pytest.raises(ReadError):
        unpack(tmp_path / "lie.zip", tmp_path / "out", SMALL)
    assert sum(p.stat().st_size for p in (tmp_path / "out").rglob("*") if p.is_file()) <= 100


@settings(max_examples=30)
@given(st.binary(max_size=400), st.integers(0, 400))
def test_a_broken_archive_is_a_sentence(noise: bytes, cut: int) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/matrix.mtx", b"some text " * 50)
    whole = buffer.getvalue()
    for content in (noise, whole[:cut], whole[:cut] + noise + whole[cut:]):
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "a.zip").write_bytes(content)
            try:
                unpack(Path(folder) / "a.zip", Path(folder) / "out", SMALL)
            except ReadError:
                continue


def test_locked_and_unusual_archives_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ReadError, match="method that is not read"):
        unpack(zipped(tmp_path / "a.zip", {"a.h5": b"a"}, zipfile.ZIP_LZMA), tmp_path / "out", SMALL)
    locked = bytearray(zipped(tmp_path / "b.zip", {"a.h5": b"a"}).read_bytes())
    locked[6] |= 1
    locked[locked.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "b.zip").write_bytes(locked)
    with pytest.raises(ReadError, match="password"):
        unpack(tmp_path / "b.zip", tmp_path / "out", SMALL)
    with pytest.raises(ReadError, match="differ in nothing but marks or case"):
        unpack(zipped(tmp_path / "c.zip", {"A<.h5": b"a", "a>.h5": b"b"}), tmp_path / "out", SMALL)
    with pytest.raises(ReadError, match="holds no files"):
        unpack(zipped(tmp_path / "d.zip", {"a/": b""}), tmp_path / "out", SMALL)


# --- jobs ---


@pytest.fixture
def jobs(tmp_path: Path) -> Jobs:
    return Jobs(tmp_path, SMALL)


def test_a_job_lies_in_a_folder_of_its_own_under_names_of_our_own(jobs: Jobs) -> None:
    job = jobs.add("me", "model", [("<b>P07</b>.h5ad", 10)])
    assert job.name == "b>.h5ad"
    assert [p.stat().st_mode & 0o777 for p in (job.folder, job.query.parent)] == [0o700, 0o700]
    assert job.query == job.uploads[0].target.parent  # a slash makes a folder
    assert job.query.is_relative_to(jobs.root)
    assert jobs.by_id[job.id] is job
    assert len(job.id) >= 32
    jobs.remove(job)
    assert not list(jobs.root.iterdir())


def test_where_files_of_several_kinds_go(jobs: Jobs) -> None:
    trio = [(f"{name}.gz", 5) for name in ("matrix.mtx", "features.tsv", "barcodes.tsv")]
    job = jobs.add("me", "model", trio)
    assert job.query.name == job.name == "sample"
    assert {u.target.name for u in job.uploads} == {name for name, _ in trio}
    geo = jobs.add("me", "model", [(f"GSM12_P07_{name}", 5) for name, _ in trio])
    assert geo.name == "GSM12_P07"
    folder = jobs.add("me", "model", [(f"run/{s}/{name}", 5) for s in "ab" for name, _ in trio])
    assert folder.query.name == "run"
    assert folder.uploads[0].target == folder.query / "a" / "matrix.mtx.gz"
    packed = jobs.add("me", "model", [("P07.zip", 5)])
    assert (packed.query.name, packed.archive) == ("P07", packed.uploads[0].target)
    demo = jobs.add("me", "model", [])
    assert demo.demo
    assert demo.query.name == "demo.h5ad"


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ([("a.h5ad", 6 * MIB)], r"a.h5ad has 6 MB, and this page takes 4 MB; start it .* --max-upload"),
        ([("a.h5", 3 * MIB), ("b.h5", 2 * MIB)], "5 MB"),
        ([("a.h5ad", 0)], "is empty"),
        ([("features.tsv", 3), ("barcodes.tsv", 3)], "no matrix among"),
        ([("a.zip", 3), ("b.h5", 3)], "a zip goes alone"),
        ([("../a.h5ad", 3)], "out of its folder"),
        ([("a<.h5", 3), ("A>.h5", 3)], "differ in nothing but"),
        ([(f"{n}.h5", 3) for n in range(30)], "30 files are more than 20"),
        ([("a.rds", 3)], "anndataR"),
    ],
)
def test_what_makes_no_job_leaves_nothing(jobs: Jobs, files: list[tuple[str, int]], said: str) -> None:
    with pytest.raises(CarvaeError, match=said):
        jobs.add("me", "model", files)
    assert not jobs.by_id
    assert not list(jobs.root.iterdir())


def test_all_jobs_together_are_bounded(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path, Limits(max_upload=100, stored_factor=2, max_jobs=3))
    first, second = (jobs.add("me", "model", [("a.h5ad", 100)]) for _ in range(2))
    first.uploads[0].received = second.uploads[0].received = 1
    with pytest.raises(ReadError, match="as many files as it may"):
        jobs.add("you", "model", [("a.h5ad", 1)])
    first.end(State.CANCELLED)
    third = jobs.add("you", "model", [("a.h5ad", 1)])
    result = third.folder / "result" / "x"
    result.write_bytes(bytes(100))
    third.results = {"annotated": result}
    third.end(State.DONE)
    with pytest.raises(ReadError, match="as many files as it may"):
        jobs.need_room(1)
    jobs.remove(third)
    jobs.add("you", "model", [("a.h5ad", 1)])
    jobs.remove(second)
    jobs.add("you", "model", [])
    with pytest.raises(ConfigError, match="3 jobs are kept already"):
        jobs.add("you", "model", [])


def test_what_was_uploaded_goes_when_a_job_ends(jobs: Jobs) -> None:
    def ended(state: State) -> tuple[Job, set[str]]:
        job = jobs.add("me", "model", [("a.h5ad", 10)])
        job.uploads[0].target.write_bytes(b"0123456789")
        (job.folder / "result" / "x").write_text("x")
        job.end(state, "why")
        return job, {p.name for p in job.folder.rglob("*")}

    assert ended(State.DONE)[1] == {"result", "x"}
    job, left = ended(State.FAILED)
    assert (job.error, left) == ("why", set())


# --- the script ---


def task(job: Job, hashes: dict[str, str]) -> Task:
    return Task(
        "run",
        str(job.query),
        str(job.archive or ""),
        job.demo,
        "/models/my model",
        str(job.folder / "result"),
        job.stem,
        job.name,
        hashes,
        {"predict": {"min_counts": 30}, "seed": 1},
        SMALL,
    )


def hashes_of(folder: Path, names: list[str]) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def run_script(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Run it with a carvae that says what it was asked."""
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / "carvae").write_text('#!/bin/sh\nfor a in "$@"; do printf "[%s]" "$a"; done\necho\n')
    (folder / "bin" / "carvae").chmod(0o755)
    (folder / "repeat.sh").write_text(script)
    path = {"PATH": f"{folder / 'bin'}:/usr/bin:/bin"}
    return subprocess.run(["sh", "repeat.sh"], cwd=folder, env=path, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("names", [["P 07's.h5ad"], ["P07.zip"], ["matrix.mtx", "features.tsv", "barcodes.tsv"], []])
def test_the_script_gives_the_command_line_what_the_page_was_given(jobs: Jobs, names: list[str]) -> None:
    here = jobs.root / "here"
    here.mkdir()
    for name in names:
        (here / name).write_bytes(name.encode())
        if name.endswith(".zip"):
            zipped(here / name, {"matrix.mtx": b"m"})
    job = jobs.add("me", "model", [(name, 10) for name in names])
    script = repeat_script(task(job, hashes_of(here, names)))
    done = run_script(here, script)
    assert done.returncode == 0, done.stderr
    folder = f"{job.stem}_query/{job.stem}"
    query = "demo_carvae.h5ad" if not names else names[0] if names[0].endswith(".h5ad") else folder
    annotated, report = [line for line in done.stdout.splitlines() if line.startswith("[")]
    again = f"{job.stem}_again.h5ad"
    assert annotated == (
        f"[annotate][{query}][--model][/models/my model][--out][{again}][predict.min_counts=30][seed=1]"
    )
    assert report == f"[report][{again}][--model][/models/my model][--out][{job.stem}_report_again.html]"
    if names and query == folder:
        assert (here / folder / "matrix.mtx").exists()
    for name in names:
        (here / name).write_bytes(b"another")
        assert run_script(here, script).returncode != 0, "a changed file must stop the script"


RANGER = "filtered_feature_bc_matrix"
TRIO = {
    "matrix.mtx": b"%%MatrixMarket matrix coordinate integer general\n2 2 2\n1 1 5\n2 2 7\n",
    "features.tsv": b"ENSG00000167286\tCD3D\tGene Expression\nENSG00000010610\tCD4\tGene Expression\n",
    "barcodes.tsv": b"AAACCTGAGAAACCAT-1\nAAACCTGAGAAACCGC-1\n",
}


@pytest.mark.parametrize(
    ("given", "packed", "samples"),
    [
        ([""], "", ["sample"]),
        ([f"{RANGER}/"], "", ["sample"]),
        (["P07/"], "", ["P07"]),
        ([f"P07/outs/{RANGER}/"], "", ["P07"]),
        (["cohort/P07/", "cohort/P08/"], "", ["P07", "P08"]),
        ([f"{RANGER}/"], f"{RANGER}.zip", [f"{RANGER}.zip"]),
        ([f"{RANGER}/"], "P07.zip", ["P07"]),
        (["study/P07/", "study/P08/"], "all.zip", ["P07", "P08"]),
    ],
)
def test_a_sample_is_called_the_same_by_the_page_and_by_the_script(
    jobs: Jobs, given: list[str], packed: str, samples: list[str]
) -> None:
    here = jobs.root / "here"
    files = {f"{place}{name}": content for place in given for name, content in TRIO.items()}
    if packed:
        here.mkdir()
        files = {packed: zipped(here / packed, files).read_bytes()}
    job = jobs.add("me", "model", [(name, len(content)) for name, content in files.items()])
    for upload, (name, content) in zip(job.uploads, files.items(), strict=True):
        for place in (upload.target, here / name):
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)
    if packed:
        job.query = _unpacked(task(job, {}), lambda _: None)
    done = run_script(here, repeat_script(task(job, hashes_of(here, list(files)))))
    assert done.returncode == 0, done.stderr
    again = re.search(r"\[annotate\]\[(.*?)\]", done.stdout)
    assert again is not None
    for query in (job.query, here / again[1]):
        parts = open_samples(query)
        assert sorted(part.name for part in parts) == samples


@pytest.mark.parametrize(
    ("name", "called"), [("P07.h5", "P07"), (f"{RANGER}.h5", f"{RANGER}.h5"), (f"P07_{RANGER}.h5", "P07")]
)
def test_a_file_by_cell_ranger_is_called_by_its_own_name_at_least(jobs: Jobs, name: str, called: str) -> None:
    job = jobs.add("me", "model", [(name, 10)])
    assert _sample_name(job.query, job.query) == called
    script = repeat_script(task(job, {name: "0" * 64}))
    assert (f"{RANGER}_query/{name}/{name}" in script) is (called == name)


def test_a_name_in_the_script_is_never_a_command(tmp_path: Path) -> None:
    for name in ("$(touch evil);'`touch evil`.h5ad", "$(touch evil).zip"):
        (tmp_path / "jobs").mkdir(exist_ok=True)
        job = Jobs(tmp_path / "jobs", SMALL).add("me", "model", [(name, 10)])
        script = repeat_script(task(job, {name: "0" * 64}))
        (tmp_path / "repeat.sh").write_text(script.replace("| same", ""))  # such that it goes on
        subprocess.run(["sh", "repeat.sh"], cwd=tmp_path, capture_output=True, check=False)
        assert not list(tmp_path.rglob("evil"))
