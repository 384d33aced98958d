// Elements from words. Text is always text: nothing that a file says is ever read as HTML.

export type Child = Node | string | null | undefined | false;
type Value = string | number | boolean | null | ((event: Event) => void);

export function h<K extends keyof HTMLElementTagNameMap>(
  tag: K,
  attributes: Record<string, Value> = {},
  ...children: Child[]
): HTMLElementTagNameMap[K] {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null) element.setAttribute(name, String(value));
  }
  element.append(...children.filter((child): child is Node | string => Boolean(child)));
  return element;
}

export function list(items: Child[], attributes: Record<string, Value> = {}): HTMLUListElement {
  return h("ul", attributes, ...items.map((item) => h("li", {}, item)));
}

export function table(caption: string, head: string[], rows: Child[][], numbers: number[] = []): HTMLElement {
  const cell = (tag: "td" | "th", child: Child, column: number, scope: string | null): HTMLElement =>
    h(tag, { class: numbers.includes(column) ? "number" : null, scope }, child);
  return h(
    "div",
    { class: "table", tabindex: 0, role: "region", "aria-label": caption },
    h(
      "table",
      {},
      h("caption", { class: "unseen" }, caption),
      h("thead", {}, h("tr", {}, ...head.map((name, column) => cell("th", name, column, "col")))),
      h(
        "tbody",
        {},
        ...rows.map((row) =>
          h("tr", {}, ...row.map((child, column) => cell(column ? "td" : "th", child, column, column ? null : "row"))),
        ),
      ),
    ),
  );
}

export const count = (n: number): string => n.toLocaleString("en");

export const plural = (n: number, word: string): string => `${count(n)} ${word}${n === 1 ? "" : "s"}`;

export function size(bytes: number): string {
  for (const [unit, of] of [["GB", 2 ** 30], ["MB", 2 ** 20], ["KB", 2 ** 10]] as const)
    if (bytes >= of) return `${(bytes / of).toFixed(bytes >= 10 * of ? 0 : 1)} ${unit}`;
  return plural(bytes, "byte");
}

export function duration(seconds: number): string {
  if (seconds >= 2 * 3600) return `${Math.round(seconds / 3600)} hours`;
  if (seconds >= 100) return `${Math.round(seconds / 60)} minutes`;
  return plural(Math.max(5, Math.ceil(seconds / 5) * 5), "second");
}

let spoken = "";

/** Tell a screen reader, once. */
export function say(text: string): void {
  if (text === spoken) return;
  spoken = text;
  const live = document.getElementById("live");
  if (live) live.textContent = text;
}
