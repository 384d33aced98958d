// Files on their way to the server; they live as long as the page does.

import { ask, GONE, type Job, sentenceOf } from "./api";

interface Given {
  name: string;
  file: File;
}

const under_way = new Map<string, XMLHttpRequest>();

addEventListener("beforeunload", (event) => {
  if (under_way.size) event.preventDefault();
});

/** The files of a drop, those in folders with the folders before their names. */
export async function dropped(transfer: DataTransfer): Promise<Given[]> {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry()).filter((entry) => entry !== null);
  if (!entries.length) return chosen(transfer.files);
  const found: Given[] = [];
  for (const entry of entries) await walk(entry, found);
  return found;
}

export function chosen(files: FileList | null): Given[] {
  return [...(files ?? [])].map((file) => ({ name: file.name, file }));
}

async function walk(entry: FileSystemEntry, found: Given[]): Promise<void> {
  if (entry instanceof FileSystemFileEntry) {
    const file = await new Promise<File>((resolve, reject) => entry.file(resolve, reject));
    found.push({ name: entry.fullPath.replace(/^\//, ""), file });
  } else if (entry instanceof FileSystemDirectoryEntry) {
    const reader = entry.createReader();
    for (;;) {
      const inside = await new Promise<FileSystemEntry[]>((resolve, reject) => reader.readEntries(resolve, reject));
      if (!inside.length) return;
      for (const child of inside) await walk(child, found);
    }
  }
}

/** Announce files and send them; resolves once they are announced. */
export async function send(model: string, given: Given[]): Promise<Job> {
  const files = given.map(({ name, file }) => ({ name, size: file.size }));
  const job = await ask<Job>("POST", "/api/jobs", { model, files });
  void sendAll(job, new Map(given.map(({ name, file }) => [name, file])));
  return job;
}

async function sendAll(job: Job, files: Map<string, File>): Promise<void> {
  for (const [number, { name }] of job.files.entries()) {
    const file = files.get(name);
    if (file === undefined || !(await sendOne(job.id, number, file))) return;
  }
}

function sendOne(id: string, number: number, file: File): Promise<boolean> {
  return new Promise((resolve) => {
    const request = new XMLHttpRequest();
    const end = (sentence: string): void => {
      under_way.delete(id);
      if (sentence) document.dispatchEvent(new CustomEvent("broken", { detail: { id, sentence } }));
      resolve(!sentence);
    };
    request.open("PUT", `/api/jobs/${id}/files/${number}`);
    request.onload = () => end(request.status === 200 ? "" : sentenceOf(request.responseText));
    request.onerror = () => end(GONE);
    request.onabort = () => end("The upload was cancelled.");
    under_way.set(id, request);
    request.send(file);
  });
}

export function abort(id: string): void {
  under_way.get(id)?.abort();
}
