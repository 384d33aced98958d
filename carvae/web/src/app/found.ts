// What was found in a file and what is missing, before anything runs.

import type { Found, Job } from "./api";
import { type Child, count, duration, h, list, plural, size, table } from "./dom";

const SHOWN = 12;
const LOW = 0.9;

export function found(job: Job, act: (action: "start" | "cancel") => void): HTMLElement {
  const facts = job.found as Found;
  const warned = warnings(facts);
  return h(
    "div",
    {},
    h("h2", {}, "What was found"),
    h("dl", { class: "facts" }, ...rows(facts)),
    warned.length > 0 && h("h2", {}, "What to know before"),
    warned.length > 0 && list(warned, { class: "warned" }),
    h(
      "p",
      { class: "actions" },
      h("button", { type: "button", class: "primary", click: () => act("start") }, `Label ${plural(facts.cells, "cell")}`),
      h("button", { type: "button", click: () => act("cancel") }, "Cancel"),
      h("span", { class: "hint" }, `Takes about ${duration(job.expected_s)} on this computer.`),
    ),
    Object.keys(facts.samples).length > 1 && h("h2", {}, "Samples"),
    Object.keys(facts.samples).length > 1 &&
      table("Samples and their cells", ["Sample", "Cells"], Object.entries(facts.samples).map(([n, c]) => [n, count(c)]), [1]),
  );
}

function rows(facts: Found): HTMLElement[] {
  const samples = Object.keys(facts.samples);
  const shown = `${samples.slice(0, 3).join(", ")}${samples.length > 3 ? ", …" : ""}`;
  const places = [...new Set(facts.sources.map((source) => source.counts_in))];
  const { matched, n_panel, overlap, aliased, missing } = facts.genes;
  const genes = [
    `${count(matched)} of the model's ${count(n_panel)} are here (${Math.floor(overlap * 1000) / 10}%)`,
    aliased.length > 0 && `; ${count(aliased.length)} under another name`,
  ];
  return [
    ...row("Cells", count(facts.cells)),
    ...row("Samples", `${count(samples.length)}: ${shown}`),
    ...row("Patients", facts.patients ? `${count(facts.patients.length)}: ${some(facts.patients, 3)}` : "not named"),
    ...row("Raw counts", `found in ${places.join(", ")}`),
    ...row("Genes", h("span", {}, h("meter", { min: 0, max: 1, low: 0.4, high: LOW, optimum: 1, value: overlap, "aria-label": "Share of the model's genes" }), ...genes)),
    ...(missing.length ? row("Missing genes", more(missing)) : []),
    ...row("Missing markers", facts.markers_missing.length ? more(facts.markers_missing) : "none"),
    ...row("CAR", facts.car_features.length ? `told from ${facts.car_features.join(", ")}` : "no feature of it is known"),
    ...row("T-cell receptors", facts.clones ? "found" : "none"),
  ];
}

function row(name: string, value: Child): HTMLElement[] {
  return [h("dt", {}, name), h("dd", {}, value)];
}

function warnings(facts: Found): Child[] {
  const low = facts.genes.overlap < LOW;
  const notes = facts.sources.flatMap((source) => source.notes.map((note) => `${source.name}: ${note}.`));
  return [
    low &&
      `${Math.round((1 - facts.genes.overlap) * 100)}% of the model's genes are missing, so labels will be less sure than the model card says.`,
    facts.unknown_of_tried > 0.2 &&
      `Of the first ${count(facts.tried)} cells ${Math.round(facts.unknown_of_tried * 100)}% would be called unknown: too few counts, or unlike what the model knows.`,
    facts.memory_bytes > facts.free_bytes &&
      `This needs about ${size(facts.memory_bytes)} of memory and ${size(facts.free_bytes)} are free; close other programs first.`,
    facts.signatures_unscored.length > 0 &&
      `Too few genes for a score of ${facts.signatures_unscored.join(", ")}.`,
    ...[...new Set(notes)].slice(0, SHOWN),
  ].filter(Boolean);
}

const some = (names: string[], n: number): string => `${names.slice(0, n).join(", ")}${names.length > n ? ", …" : ""}`;

function more(names: string[]): Child {
  if (names.length <= SHOWN) return names.join(", ");
  return h("details", {}, h("summary", {}, `${count(names.length)}: ${some(names, 5)}`), names.join(", "));
}
