// The first page: give a file, try the demo, come back to earlier ones.

import { type About, ask, type Job, type Listed, type Model, type State } from "./api";
import { count, h, list, plural, say, size } from "./dom";
import { chosen, dropped, send } from "./upload";

export const STATES: Record<State, string> = {
  uploading: "uploading",
  waiting: "waiting to be looked at",
  checking: "being looked at",
  ready: "ready: look at what was found",
  queued: "waiting for its turn",
  running: "running",
  done: "done",
  failed: "not possible",
  cancelled: "cancelled",
};

export async function home(about: About): Promise<HTMLElement> {
  const { jobs } = await ask<{ jobs: Listed[] }>("GET", "/api/jobs");
  const alert = h("p", { class: "alert", role: "alert", hidden: true });
  const choice = modelChoice(about.models);
  const model = (): string => (choice instanceof HTMLSelectElement ? choice.value : (about.models[0]?.name ?? ""));

  const begin = async (start: () => Promise<Job>): Promise<void> => {
    alert.hidden = true;
    try {
      location.hash = `job/${(await start()).id}`;
    } catch (error) {
      alert.textContent = error instanceof Error ? error.message : String(error);
      alert.hidden = false;
    }
  };
  const give = (files: Awaited<ReturnType<typeof dropped>>): void => {
    if (files.length) void begin(() => send(model(), files));
  };
  return h(
    "section",
    {},
    h("h1", { tabindex: -1 }, "Label a sample"),
    choice instanceof HTMLSelectElement && h("p", {}, h("label", { for: "model" }, "Model "), choice),
    dropZone(about, give),
    alert,
    h(
      "p",
      { class: "actions" },
      h(
        "button",
        { type: "button", click: () => void begin(() => ask<Job>("POST", "/api/jobs", { model: model(), demo: true })) },
        "Try the demo",
      ),
      h("span", { class: "hint" }, "Simulated cells drawn from the model; nothing is uploaded."),
    ),
    h("h2", {}, about.models.length > 1 ? "The models" : "The model"),
    list(about.models.map(modelText)),
    jobs.length > 0 && h("h2", {}, "Your samples"),
    jobs.length > 0 && jobList(jobs),
  );
}

function dropZone(about: About, give: (files: ReturnType<typeof chosen>) => void): HTMLElement {
  const input = h("input", { type: "file", id: "files", multiple: true, "aria-describedby": "kinds" });
  input.addEventListener("change", () => give(chosen(input.files)));
  const zone = h(
    "div",
    { class: "drop" },
    h("p", { class: "big" }, h("label", { for: "files" }, "Drop a file here, or choose one")),
    input,
    h(
      "p",
      { class: "hint", id: "kinds" },
      "An .h5ad, a 10x .h5, a zipped 10x folder, or the three files matrix.mtx, features.tsv and barcodes.tsv " +
        `together; raw counts, human genes, at most ${size(about.max_upload)}. A folder can be dropped too.`,
    ),
  );
  const lit = (on: boolean) => (event: Event) => {
    event.preventDefault();
    zone.classList.toggle("over", on);
  };
  zone.addEventListener("dragover", lit(true));
  zone.addEventListener("dragleave", lit(false));
  zone.addEventListener("drop", (event) => {
    lit(false)(event);
    if (event.dataTransfer) void dropped(event.dataTransfer).then(give);
  });
  return zone;
}

function modelChoice(models: Model[]): HTMLSelectElement | null {
  if (models.length < 2) return null;
  return h("select", { id: "model" }, ...models.map(({ name }) => h("option", { value: name }, name)));
}

function modelText(model: Model): HTMLElement {
  const learned = `${count(model.cells)} cells of ${plural(model.patients, "patient")} in ${
    model.studies === 1 ? "1 study" : `${count(model.studies)} studies`
  }`;
  return h(
    "span",
    {},
    h("strong", {}, model.name),
    ` (${model.id}) learned from ${learned}, ${count(model.genes)} genes. It tells ${model.states.join(", ")}.`,
    model.weak && " Some of its labels were derived from gene signatures, so they are weak.",
    !model.judges && " It was trained without learning how sure it is, so it gives no verdict on a sample.",
  );
}

function jobList(jobs: Listed[]): HTMLElement {
  const items = [...jobs].reverse().map((job) => {
    const remove = h("button", { type: "button", class: "plain", "aria-label": `Remove ${job.name}` }, "Remove");
    const item = h(
      "span",
      { class: "job" },
      h("a", { href: `#job/${job.id}` }, job.name),
      h("span", { class: `chip ${job.state}` }, STATES[job.state]),
      remove,
    );
    remove.addEventListener("click", () => {
      void ask("DELETE", `/api/jobs/${job.id}`).then(() => {
        item.parentElement?.remove();
        say(`${job.name} was removed`);
      });
    });
    return item;
  });
  return list(items, { class: "jobs" });
}
