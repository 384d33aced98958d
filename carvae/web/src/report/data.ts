// What the page carries for its map: a header in JSON and the values, gzipped bytes in base64.

export interface CategoryColumn {
  kind: "category";
  name: string;
  group: string;
  offset: number;
  categories: string[];
  colours: string[];
}

export interface NumberColumn {
  kind: "number";
  name: string;
  group: string;
  offset: number;
  bits: 8 | 16 | 32;
  low: number;
  high: number;
  /** Ends of the colours, on the scale that is shown. */
  first: number;
  last: number;
  none: boolean;
}

export type Column = CategoryColumn | NumberColumn;

interface LayoutEntry {
  name: string;
  offset: number;
  training: number;
  nTraining: number;
}

interface Header {
  n: number;
  layouts: LayoutEntry[];
  columns: Column[];
  barcodes: { offset: number; length: number };
}

export interface Layout {
  name: string;
  /** Of all cells, then of the means of the training samples; -1 to 1. */
  x: Float32Array;
  y: Float32Array;
  nTraining: number;
}

const NO_CODE = 65535;
const STEPS = { 8: 254, 16: 65534 } as const;
const NO_INTEGER = -(2 ** 31);
const PLACES = 65535;

export class Cells {
  readonly n: number;
  readonly columns: Column[];
  readonly barcodes: string[];

  private constructor(
    private readonly header: Header,
    private readonly bytes: ArrayBuffer,
  ) {
    this.n = header.n;
    this.columns = header.columns;
    const { offset, length } = header.barcodes;
    this.barcodes = new TextDecoder().decode(new Uint8Array(bytes, offset, length)).split("\n");
  }

  static async read(header: string, values: string): Promise<Cells> {
    const packed = Uint8Array.from(atob(values), (letter) => letter.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Cells(JSON.parse(header) as Header, await new Response(stream).arrayBuffer());
  }

  get layoutNames(): string[] {
    return this.header.layouts.map((layout) => layout.name);
  }

  layout(name: string): Layout {
    const entry = this.header.layouts.find((layout) => layout.name === name);
    if (!entry) throw new Error(`no layout ${name}`);
    const own = new Uint16Array(this.bytes, entry.offset, 2 * this.n);
    const training = new Uint16Array(this.bytes, entry.training, 2 * entry.nTraining);
    const total = this.n + entry.nTraining;
    const x = new Float32Array(total);
    const y = new Float32Array(total);
    for (let i = 0; i < total; i++) {
      const [from, at, count] = i < this.n ? [own, i, this.n] : [training, i - this.n, entry.nTraining];
      x[i] = (from[at]! / PLACES) * 1.92 - 0.96;
      y[i] = (from[count + at]! / PLACES) * 1.92 - 0.96;
    }
    return { name, x, y, nTraining: entry.nTraining };
  }

  /** Codes of a column of categories; null where a cell has none. */
  codes(column: CategoryColumn): Uint16Array {
    return new Uint16Array(this.bytes, column.offset, this.n);
  }

  category(column: CategoryColumn, cell: number): string | null {
    const code = this.codes(column)[cell]!;
    return code === NO_CODE ? null : (column.categories[code] ?? null);
  }

  number(column: NumberColumn, cell: number): number | null {
    if (column.bits === 32) {
      const value = new Int32Array(this.bytes, column.offset, this.n)[cell]!;
      return value === NO_INTEGER ? null : value;
    }
    const codes =
      column.bits === 8 ? new Uint8Array(this.bytes, column.offset, this.n) : new Uint16Array(this.bytes, column.offset, this.n);
    const code = codes[cell]!;
    const steps = STEPS[column.bits];
    return code > steps ? null : column.low + (code / steps) * (column.high - column.low);
  }

  /** Where a number lies between the ends of the colours, 0 to 1; null where there is none. */
  shade(column: NumberColumn, cell: number): number | null {
    const value = this.number(column, cell);
    if (value === null) return null;
    const shown = column.bits === 32 ? Math.log10(1 + value) : value;
    return Math.min(1, Math.max(0, (shown - column.first) / (column.last - column.first)));
  }

  text(column: Column, cell: number): string {
    if (column.kind === "category") return this.category(column, cell) ?? "";
    const value = this.number(column, cell);
    return value === null ? "" : column.bits === 32 ? String(value) : String(Number(value.toPrecision(4)));
  }
}
