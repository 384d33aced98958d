// What came of a job: verdicts, downloads, and the report, which has no rights on this page.

import type { About, Job, Verdict } from "./api";
import { count, h, list, plural, size, table } from "./dom";

const SIGNS: Record<string, string> = { "in range": "●", "with care": "▲", "out of range": "■" };
const DOWNLOADS: [string, string][] = [
  ["report", "the report, one file that opens without a network"],
  ["annotated", "all cells with their states, for scanpy, CELLxGENE and Seurat"],
  ["cells", "one row per cell, for R and Excel"],
  ["samples", "one row per sample, for R and Excel"],
  ["script", "the commands that repeat this"],
];

export function results(job: Job, about: About): HTMLElement {
  return h(
    "div",
    {},
    h("h2", {}, "Is the model at home in these samples?"),
    h("p", {}, summary(job.samples)),
    job.demo &&
      h(
        "p",
        { class: "hint" },
        "These cells were drawn from the model and not measured. They are not quite like real ones, and the model notices: " +
          "that care is due is the right answer here.",
      ),
    verdicts(job.samples),
    h("h2", {}, "To take home"),
    downloads(job),
    job.messages.length > 0 &&
      h("details", {}, h("summary", {}, `What carvae said (${count(job.messages.length)})`), list(job.messages)),
    ...report(job),
    h("p", { class: "hint" }, `carvae ${about.version}, model ${job.model}. These files are removed when carvae app ends.`),
  );
}

function summary(samples: Verdict[]): string {
  const judged = samples.filter((sample) => sample.verdict);
  if (!judged.length) return "This model was trained without learning how sure it is, so it gives no verdict.";
  const parts = Object.keys(SIGNS)
    .map((verdict) => ({ verdict, n: judged.filter((sample) => sample.verdict === verdict).length }))
    .filter(({ n }) => n > 0)
    .map(({ verdict, n }) => `${count(n)} ${verdict}`);
  return `Of ${plural(judged.length, "sample")}: ${parts.join(", ")}.`;
}

function verdicts(samples: Verdict[]): HTMLElement {
  const judged = samples.some((sample) => sample.verdict);
  const head = ["Sample", "Cells", "Of them labelled", ...(judged ? ["Verdict"] : [])];
  const rows = samples.map((sample) => {
    const verdict = sample.verdict ?? "";
    const plain = [sample.sample, count(sample.n_cells), count(sample.n_cells_used)];
    const sign = h("span", { class: `verdict ${verdict.replaceAll(" ", "-")}` }, `${SIGNS[verdict] ?? ""} ${verdict}`);
    const why = h("span", { class: "why" }, sample.verdict_reason || "as in training");
    return judged ? [...plain, h("span", {}, sign, why)] : plain;
  });
  return table("Verdict on each sample", head, rows, [1, 2]);
}

function downloads(job: Job): HTMLElement {
  const items = DOWNLOADS.filter(([key]) => key in job.downloads).map(([key, what]) => {
    const file = job.downloads[key] as { name: string; size: number };
    return h(
      "span",
      {},
      h("a", { href: `/jobs/${job.id}/files/${key}`, download: file.name }, file.name),
      ` (${size(file.size)}): ${what}`,
    );
  });
  return list(items, { class: "downloads" });
}

function report(job: Job): HTMLElement[] {
  if (!("report" in job.downloads)) {
    const why = job.messages.find((message) => message.startsWith("there is no report"));
    return [h("p", { class: "alert" }, why ?? "There is no report.")];
  }
  const address = `/jobs/${job.id}/report`;
  return [
    h("h2", {}, "The report"),
    h("p", {}, h("a", { href: address, target: "_blank", rel: "noopener" }, "Open it on a page of its own")),
    h("iframe", { src: address, title: `Report on ${job.name}`, sandbox: "allow-scripts allow-downloads" }),
  ];
}
