// The map: cells as dots, coloured by what the reader chooses, and chosen with a lasso.
import createScatterplot from "regl-scatterplot";
import { type CategoryColumn, Cells, type Column, type Layout, type NumberColumn } from "./data";
import { csv, save } from "./save";

/** Viridis (matplotlib), which is even in lightness and apart for colour-blind readers. */
const VIRIDIS = ["#440154", "#482878", "#3e4a89", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6dcd59", "#b4de2c", "#fde725"];
const STEPS = 64;
const GREY = "#b5b5b5";
const TRAINING = "#8a8a8a";
const FEW = 2000;

type Scatterplot = ReturnType<typeof createScatterplot>;

const element = <T extends HTMLElement>(id: string): T => {
  const found = document.getElementById(id);
  if (!found) throw new Error(`the page has no ${id}`);
  return found as T;
};

function ramp(dark: boolean): string[] {
  // On a dark page the darkest colours would not be seen.
  const rgb = VIRIDIS.slice(dark ? 2 : 0).map((hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)));
  return Array.from({ length: STEPS }, (_, step) => {
    const at = (step / (STEPS - 1)) * (rgb.length - 1);
    const low = Math.min(Math.floor(at), rgb.length - 2);
    const mixed = rgb[low]!.map((value, i) => Math.round(value + (rgb[low + 1]![i]! - value) * (at - low)));
    return `#${mixed.map((value) => value.toString(16).padStart(2, "0")).join("")}`;
  });
}

/** A random order that is the same each time. */
function shuffled(n: number): number[] {
  const order = Array.from({ length: n }, (_, i) => i);
  let state = 1;
  for (let i = n - 1; i > 0; i--) {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    const j = state % (i + 1);
    [order[i], order[j]] = [order[j]!, order[i]!];
  }
  return order;
}

export class CellMap {
  private readonly plot: Scatterplot;
  private readonly order: number[];
  private column: Column;
  private layout: Layout;
  private codes: Uint16Array<ArrayBufferLike> = new Uint16Array();
  private chosen: number[] = [];
  private alone: number | null = null;
  private readonly dark = matchMedia("(prefers-color-scheme: dark)");
  private ramp = ramp(this.dark.matches);

  constructor(private readonly cells: Cells) {
    this.order = shuffled(cells.n);
    this.column = cells.columns[0]!;
    this.layout = cells.layout(cells.layoutNames[0]!);
    this.plot = createScatterplot({
      canvas: element<HTMLCanvasElement>("canvas"),
      ...this.size(),
      colorBy: "valueA",
      sizeBy: "valueB",
      pointOutlineWidth: 1,
      pointSizeSelected: 1,
      lassoOnLongPress: false, // its sign is styled by text, which the policy refuses; there is a button
      lassoInitiator: false,
      spatialIndexUseWorker: false,
      ...this.look(),
    });
    this.fill();
    this.listen();
    void this.draw(true);
  }

  /** The room for the canvas; by itself the library would measure what it then changes. */
  private size() {
    const { clientWidth, clientHeight } = element("frame");
    return { width: clientWidth, height: clientHeight };
  }

  /** The whole map, which is as wide as it is high, however narrow the frame. */
  private home(): void {
    const { width, height } = this.size();
    this.plot.reset();
    this.plot.set({ cameraDistance: Math.max(1, height / width) });
  }

  private look() {
    const style = getComputedStyle(document.documentElement);
    const ink = style.getPropertyValue("--ink").trim();
    return {
      backgroundColor: style.getPropertyValue("--map").trim(),
      pointColorActive: ink,
      pointColorHover: ink,
      lassoColor: ink,
      opacity: this.cells.n > FEW ? 0.75 : 0.9,
    };
  }

  private fill(): void {
    const select = element<HTMLSelectElement>("colour");
    for (const group of new Set(this.cells.columns.map((column) => column.group))) {
      const options = document.createElement("optgroup");
      options.label = group;
      for (const column of this.cells.columns.filter((own) => own.group === group)) {
        options.append(new Option(column.name, String(this.cells.columns.indexOf(column))));
      }
      select.append(options);
    }
    element<HTMLSelectElement>("layout").append(...this.cells.layoutNames.map((name) => new Option(name, name)));
    const size = element<HTMLInputElement>("size");
    size.value = String(Math.min(8, Math.max(2, Math.round(2 * (600 / Math.sqrt(this.cells.n)) * 0.45) / 2)));
  }

  private listen(): void {
    const on = (id: string, kind: string, act: () => void) => element(id).addEventListener(kind, act);
    on("colour", "change", () => {
      this.column = this.cells.columns[Number(element<HTMLSelectElement>("colour").value)]!;
      void this.draw();
    });
    on("layout", "change", () => {
      this.layout = this.cells.layout(element<HTMLSelectElement>("layout").value);
      void this.draw(true);
    });
    on("size", "input", () => this.plot.set({ pointSize: this.sizes() }));
    on("lasso", "click", () => this.lasso(element("lasso").getAttribute("aria-pressed") !== "true"));
    on("clear", "click", () => {
      this.plot.deselect();
      this.choose([]);
    });
    on("home", "click", () => this.home());
    on("csv", "click", () => this.saveCells(this.order.map((_, i) => i), "cells.csv"));
    on("csvChosen", "click", () => this.saveCells(this.chosen, "cells_chosen.csv"));
    on("png", "click", () => void this.savePicture());
    this.plot.subscribe("select", ({ points }) => this.choose(points.filter((cell) => cell < this.cells.n)));
    this.plot.subscribe("deselect", () => this.choose([]));
    this.plot.subscribe("pointOver", (cell) => this.tip(cell));
    this.plot.subscribe("pointOut", () => this.tip(null));
    new ResizeObserver(() => this.plot.set(this.size())).observe(element("frame"));
    this.dark.addEventListener("change", () => {
      this.plot.set(this.look());
      this.ramp = ramp(this.dark.matches);
      void this.draw();
    });
  }

  private lasso(pressed: boolean): void {
    element("lasso").setAttribute("aria-pressed", String(pressed));
    this.plot.set({ mouseMode: pressed ? "lasso" : "panZoom" });
  }

  private sizes(): number[] {
    const size = Number(element<HTMLInputElement>("size").value);
    return this.layout.nTraining ? [size, Math.max(9, 2.5 * size)] : [size];
  }

  /** Colours of a column as codes: a category each, or a step of the ramp; the last two are "none" and "training". */
  private coloured(): { codes: Uint16Array<ArrayBufferLike>; colours: string[]; order: number[] } {
    const { cells, column } = this;
    if (column.kind === "category") {
      const none = column.categories.length;
      const codes = cells.codes(column).map((code) => Math.min(code, none));
      const isGrey = (cell: number) => (column.colours[codes[cell]!] ?? GREY).toLowerCase() === GREY;
      const order = [...this.order.filter(isGrey), ...this.order.filter((cell) => !isGrey(cell))];
      return { codes, colours: [...column.colours, GREY, TRAINING], order };
    }
    const codes = new Uint16Array(cells.n);
    for (let cell = 0; cell < cells.n; cell++) {
      const shade = cells.shade(column, cell);
      codes[cell] = shade === null ? STEPS : Math.round(shade * (STEPS - 1));
    }
    // The highest on top; what has no value below all.
    const height = (cell: number) => (codes[cell] === STEPS ? -1 : codes[cell]!);
    return { codes, colours: [...this.ramp, GREY, TRAINING], order: [...this.order].sort((a, b) => height(a) - height(b)) };
  }

  private async draw(moved = false): Promise<void> {
    const { codes, colours, order } = this.coloured();
    this.codes = codes;
    this.alone = null;
    const { x, y, nTraining } = this.layout;
    const n = this.cells.n;
    const valueA = new Float32Array(n + nTraining).fill(colours.length - 1);
    valueA.set(codes);
    const valueB = new Float32Array(n + nTraining).fill(1);
    valueB.fill(0, 0, n);
    const first = Array.from({ length: nTraining }, (_, i) => n + i);
    this.plot.set({ pointColor: colours, pointSize: this.sizes(), pointOrder: null });
    await this.plot.draw({ x, y, valueA, valueB }, { zDataType: "categorical", wDataType: "categorical", select: this.chosen });
    this.plot.set({ pointOrder: [...first, ...order] });
    if (moved) this.home();
    this.legend();
    element("cellmap").dataset.drawn = `${this.layout.name}/${this.column.name}`;
  }

  private legend(): void {
    const legend = element("legend");
    const column = this.column;
    legend.replaceChildren(heading(column.name));
    if (column.kind === "category") this.categories(legend, column);
    else this.scale(legend, column);
    if (this.layout.nTraining) legend.append(row(TRAINING, "mean of a training sample", null));
  }

  private categories(legend: HTMLElement, column: CategoryColumn): void {
    const count = new Array<number>(column.categories.length + 1).fill(0);
    for (const code of this.codes) count[code]!++;
    const list = document.createElement("ul");
    [...column.categories, "not known"].forEach((name, code) => {
      if (!count[code]) return;
      const button = row(column.colours[code] ?? GREY, name, count[code]!, "button") as HTMLButtonElement;
      button.title = "Show these cells alone";
      button.setAttribute("aria-pressed", "false");
      button.addEventListener("click", () => this.show(code, list));
      const item = document.createElement("li");
      button.dataset.code = String(code);
      item.append(button);
      list.append(item);
    });
    legend.append(list);
  }

  /** One category alone, or all again. */
  private show(code: number, list: HTMLElement): void {
    this.alone = this.alone === code ? null : code;
    for (const button of list.querySelectorAll("button")) {
      button.setAttribute("aria-pressed", String(Number(button.dataset.code) === this.alone));
    }
    if (this.alone === null) this.plot.unfilter();
    else this.plot.filter(this.order.filter((cell) => this.codes[cell] === this.alone));
  }

  private scale(legend: HTMLElement, column: NumberColumn): void {
    const bar = document.createElement("canvas");
    bar.className = "scale";
    bar.width = STEPS;
    bar.height = 1;
    const context = bar.getContext("2d")!;
    this.ramp.forEach((colour, step) => {
      context.fillStyle = colour;
      context.fillRect(step, 0, 1, 1);
    });
    const ends = document.createElement("p");
    ends.className = "ends";
    const shown = (value: number) => (column.bits === 32 ? Math.round(10 ** value - 1).toLocaleString("en") : String(Number(value.toPrecision(3))));
    ends.append(span(shown(column.first)), span(`${shown(column.last)}${column.last < column.high ? " or more" : ""}`));
    legend.append(bar, ends);
    if (column.none) legend.append(row(GREY, "no value", null));
  }

  private choose(points: number[]): void {
    this.chosen = points;
    const some = points.length > 0;
    for (const id of ["clear", "csvChosen"]) element<HTMLButtonElement>(id).disabled = !some;
    const box = element("chosen");
    box.replaceChildren();
    if (!some) return;
    const column = this.cells.columns[0] as CategoryColumn;
    const codes = this.cells.codes(column);
    const count = new Array<number>(column.categories.length).fill(0);
    for (const cell of points) count[codes[cell]!]!++;
    const table = document.createElement("table");
    const order = count.map((_, code) => code).filter((code) => count[code]).sort((a, b) => count[b]! - count[a]!);
    for (const code of order) {
      const line = table.insertRow();
      line.insertCell().append(swatch(column.colours[code] ?? GREY), column.categories[code]!);
      line.insertCell().textContent = count[code]!.toLocaleString("en");
      line.insertCell().textContent = `${((100 * count[code]!) / points.length).toFixed(0)}%`;
    }
    box.append(heading(`${points.length.toLocaleString("en")} cells chosen`), table);
  }

  private tip(cell: number | null): void {
    const tip = element("tip");
    if (cell === null || cell >= this.cells.n) {
      tip.textContent = cell === null ? "" : "mean of a training sample";
      return;
    }
    const wanted = new Set(["state", "confidence", "sample", this.column.name]);
    const said = this.cells.columns.filter((column) => wanted.has(column.name)).map((column) => `${column.name}: ${this.cells.text(column, cell) || "–"}`);
    tip.textContent = [this.cells.barcodes[cell], ...said].join(" · ");
  }

  private saveCells(points: number[], name: string): void {
    // The genes are for colours; the one that is shown goes along.
    const columns = this.cells.columns.filter((column) => !(column.kind === "number" && column.bits === 8) || column === this.column);
    const head = ["barcode", ...columns.map((column) => column.name), `${this.layout.name} 1`, `${this.layout.name} 2`];
    const rows = points.map((cell) => [
      this.cells.barcodes[cell] ?? "",
      ...columns.map((column) => this.cells.text(column, cell)),
      this.layout.x[cell]!.toFixed(4),
      this.layout.y[cell]!.toFixed(4),
    ]);
    save(name, csv([head, ...rows]));
  }

  private async savePicture(): Promise<void> {
    const drawn = await this.plot.export({ scale: 2 });
    const canvas = document.createElement("canvas");
    canvas.width = drawn.width;
    canvas.height = drawn.height;
    const context = canvas.getContext("2d")!;
    const layer = document.createElement("canvas");
    layer.width = drawn.width;
    layer.height = drawn.height;
    layer.getContext("2d")!.putImageData(drawn, 0, 0);
    context.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--map").trim();
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.drawImage(layer, 0, 0);
    canvas.toBlob((blob) => blob && save(`map_${this.column.name.replace(/\W+/g, "_")}.png`, blob));
  }
}

function span(text: string): HTMLSpanElement {
  const made = document.createElement("span");
  made.textContent = text;
  return made;
}

function heading(text: string): HTMLHeadingElement {
  const made = document.createElement("h4");
  made.textContent = text;
  return made;
}

function swatch(colour: string): HTMLSpanElement {
  const made = document.createElement("span");
  made.className = "swatch";
  made.style.backgroundColor = colour; // set by script, which the policy allows; text could not
  return made;
}

function row(colour: string, name: string, count: number | null, tag: "button" | "div" = "div"): HTMLElement {
  const made = document.createElement(tag);
  if (made instanceof HTMLButtonElement) made.type = "button";
  made.className = "entry";
  made.append(swatch(colour), span(name));
  if (count !== null) {
    const number = span(count.toLocaleString("en"));
    number.className = "count";
    made.append(number);
  }
  return made;
}
