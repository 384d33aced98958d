// What the server is asked, and what it says (see carvae/web/routes.py and job.py).

export interface Model {
  name: string;
  id: string;
  cells: number;
  patients: number;
  studies: number;
  genes: number;
  weak: boolean;
  judges: boolean;
  states: string[];
}

export interface About {
  version: string;
  max_upload: number;
  models: Model[];
}

export interface Source {
  name: string;
  cells: number;
  genes: number;
  counts_in: string;
  notes: string[];
}

export interface Found {
  cells: number;
  sources: Source[];
  samples: Record<string, number>;
  patients?: string[];
  timepoints?: string[];
  genes: { n_panel: number; matched: number; aliased: string[]; missing: string[]; overlap: number };
  markers_missing: string[];
  signatures_unscored: string[];
  car_features: string[];
  clones: boolean;
  memory_bytes: number;
  free_bytes: number;
  tried: number;
  unknown_of_tried: number;
}

export type State =
  | "uploading"
  | "waiting"
  | "checking"
  | "ready"
  | "queued"
  | "running"
  | "done"
  | "failed"
  | "cancelled";

export interface Verdict {
  sample: string;
  n_cells: number;
  n_cells_used: number;
  verdict?: string | null;
  verdict_reason?: string | null;
}

export interface Job {
  id: string;
  name: string;
  model: string;
  demo: boolean;
  state: State;
  ahead: number;
  error: string;
  details: string;
  files: { name: string; size: number; received: number }[];
  found: Found | null;
  expected_s: number;
  stage: string;
  share: number;
  cells: [number, number] | null;
  messages: string[];
  samples: Verdict[];
  downloads: Record<string, { name: string; size: number }>;
  created: number;
  started: number | null;
  finished: number | null;
}

export type Listed = Pick<Job, "id" | "name" | "state" | "created" | "error">;

export class Refused extends Error {
  constructor(
    readonly status: number,
    sentence: string,
  ) {
    super(sentence);
  }
}

export const GONE = "The page does not answer. Is carvae app still running in its terminal? If it was started again, open the new address that it printed.";

export async function ask<T>(method: string, path: string, body?: unknown): Promise<T> {
  let response: Response;
  try {
    response = await fetch(path, {
      method,
      headers: body === undefined ? {} : { "content-type": "application/json" },
      body: body === undefined ? null : JSON.stringify(body),
    });
  } catch {
    throw new Refused(0, GONE);
  }
  const text = await response.text();
  if (response.ok) return JSON.parse(text) as T;
  throw new Refused(response.status, sentenceOf(text));
}

export function sentenceOf(text: string): string {
  try {
    return String((JSON.parse(text) as { error: unknown }).error);
  } catch {
    return text.replace(/^carvae: /, "").trim() || GONE;
  }
}
