// One job: what was found, how far it is, what came of it.

import { type About, ask, GONE, type Job, Refused } from "./api";
import { count, duration, h, plural, say } from "./dom";
import { found } from "./found";
import { STATES } from "./home";
import { results } from "./results";
import { abort } from "./upload";

const POLL_MS = 600;
const BUSY = ["uploading", "waiting", "checking", "queued", "running"];

export class JobView {
  readonly element = h("section", {});
  private readonly body = h("div", {});
  private readonly alert = h("p", { class: "alert", role: "alert", hidden: true });
  private timer = 0;
  private shown = "";
  private closed = false;

  constructor(
    private readonly id: string,
    private readonly about: About,
  ) {
    this.element.append(h("p", {}, h("a", { href: "#" }, "← All samples")), this.alert, this.body);
    document.addEventListener("broken", this.broken);
  }

  async open(): Promise<void> {
    await this.refresh(true);
  }

  close(): void {
    this.closed = true;
    clearTimeout(this.timer);
    document.removeEventListener("broken", this.broken);
  }

  private readonly broken = (event: Event): void => {
    const { id, sentence } = (event as CustomEvent<{ id: string; sentence: string }>).detail;
    if (id === this.id && sentence === GONE) this.complain(sentence);
  };

  private complain(sentence: string): void {
    this.alert.textContent = sentence;
    this.alert.hidden = !sentence;
  }

  private async refresh(first = false): Promise<void> {
    clearTimeout(this.timer);
    try {
      this.draw(await ask<Job>("GET", `/api/jobs/${this.id}`));
      if (this.alert.textContent === GONE) this.complain("");
    } catch (error) {
      if (first || (error instanceof Refused && error.status === 404)) throw error;
      this.complain(error instanceof Error ? error.message : String(error));
      this.later();
    }
  }

  private later(): void {
    if (this.closed) return;
    this.timer = window.setTimeout(() => {
      this.refresh().catch((error: unknown) => this.complain(String(error instanceof Error ? error.message : error)));
    }, POLL_MS);
  }

  private draw(job: Job): void {
    if (this.closed) return;
    document.title = `${job.name} – carvae`;
    const busy = BUSY.includes(job.state);
    if (busy && this.shown === "busy") {
      this.progress(job);
    } else if (this.shown !== job.state) {
      const focused = this.shown !== "";
      this.shown = busy ? "busy" : job.state;
      this.body.replaceChildren(this.head(job), ...this.content(job));
      if (busy) this.progress(job);
      else say(`${job.name}: ${STATES[job.state]}. ${job.error}`);
      if (focused) this.body.querySelector("h1")?.focus();
    }
    if (busy) this.later();
  }

  private head(job: Job): HTMLElement {
    return h("h1", { tabindex: -1 }, job.name, " ", h("span", { class: `chip ${job.state}` }, STATES[job.state]));
  }

  private content(job: Job): Node[] {
    if (BUSY.includes(job.state)) return [this.waiting()];
    const another = h("p", {}, h("a", { class: "button", href: "#" }, "Give another file"));
    if (job.state === "ready") return [found(job, (action) => void this.act(action))];
    if (job.state === "done") return [results(job, this.about)];
    const sentence = job.state === "cancelled" ? "This job was cancelled, and its files are removed." : job.error;
    const lines = job.details && h("details", {}, h("summary", {}, "What it said last"), h("pre", {}, job.details));
    return [h("p", { class: "alert", role: "alert" }, sentence), ...(lines ? [lines] : []), another];
  }

  private waiting(): HTMLElement {
    return h(
      "div",
      { class: "busy" },
      h("p", { class: "stage", id: "stage" }),
      h("progress", { max: 1, "aria-labelledby": "stage" }),
      h("p", { class: "hint clock" }),
      h("details", { class: "said", hidden: true }, h("summary", {}, "What carvae says"), h("ul", {})),
      h("p", { class: "actions" }, h("button", { type: "button", click: () => void this.act("cancel") }, "Cancel")),
    );
  }

  /** Change what changes, so that focus and open details stay. */
  private progress(job: Job): void {
    const one = <E extends Element>(selector: string): E => this.body.querySelector(selector) as E;
    const chip = one<HTMLElement>(".chip");
    chip.className = `chip ${job.state}`;
    chip.textContent = STATES[job.state];
    const { text, share } = stage(job);
    one<HTMLElement>(".stage").textContent = text;
    const bar = one<HTMLProgressElement>("progress");
    if (share === null) bar.removeAttribute("value");
    else bar.value = share;
    one<HTMLElement>(".clock").textContent = clock(job);
    const said = one<HTMLDetailsElement>(".said");
    said.hidden = job.messages.length === 0;
    const items = said.querySelector("ul") as HTMLUListElement;
    for (const message of job.messages.slice(items.children.length)) items.append(h("li", {}, message));
    say(share === null ? text : `${text}, ${Math.floor(share * 4) * 25} percent`);
  }

  private async act(action: "start" | "cancel"): Promise<void> {
    if (action === "cancel") abort(this.id);
    try {
      this.draw(await ask<Job>("POST", `/api/jobs/${this.id}/${action}`));
    } catch (error) {
      this.complain(error instanceof Error ? error.message : String(error));
    }
  }
}

function stage(job: Job): { text: string; share: number | null } {
  if (job.state === "uploading") {
    const total = job.files.reduce((sum, file) => sum + file.size, 0);
    const received = job.files.reduce((sum, file) => sum + file.received, 0);
    return { text: "Uploading", share: received / Math.max(total, 1) };
  }
  if (job.state === "waiting" || job.state === "queued") {
    return { text: job.ahead ? `${plural(job.ahead, "sample")} before this one` : "Next in line", share: null };
  }
  if (job.cells && job.cells[0] > 0) {
    const [done, all] = job.cells;
    if (done < all) return { text: `${job.stage}: ${count(done)} of ${count(all)}`, share: job.share };
  }
  return { text: job.stage, share: job.share };
}

function clock(job: Job): string {
  if (job.state !== "running" || job.started === null) return "";
  return `Expected: about ${duration(job.expected_s)} in all. You can close this page and come back to this address.`;
}
