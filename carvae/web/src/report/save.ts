// Downloads. A browser makes every file itself: nothing is asked of a network.

/** A value that a spreadsheet would run as a formula gets an apostrophe, and is text again. */
export function harmless(value: string): string {
  return /^[=+\-@\t\r]/.test(value) && Number.isNaN(Number(value)) ? `'${value}` : value;
}

export function csv(rows: string[][]): string {
  const quoted = (value: string) => (/[",\n\r]/.test(value) ? `"${value.replaceAll('"', '""')}"` : value);
  return rows.map((row) => row.map((value) => quoted(harmless(value))).join(",")).join("\n") + "\n";
}

export function save(name: string, content: Blob | string, mime = "text/csv;charset=utf-8"): void {
  const url = URL.createObjectURL(typeof content === "string" ? new Blob([content], { type: mime }) : content);
  const link = document.createElement("a");
  link.href = url;
  link.download = name;
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

function plainSvg(image: HTMLImageElement): string {
  const source = new TextDecoder().decode(
    Uint8Array.from(atob(image.src.slice(image.src.indexOf(",") + 1)), (letter) => letter.charCodeAt(0)),
  );
  // The page's colours become plain ones, so that every program draws the picture.
  const style = /<style>:root\{(.*?)\}.*?<\/style>/.exec(source);
  let svg = source.replace(/<style>:root\{.*?<\/style>/, "");
  for (const [, name, colour] of (style?.[1] ?? "").matchAll(/(--\w+):(#\w+)/g)) {
    svg = svg.replaceAll(`var(${name})`, colour!);
  }
  return svg;
}

async function savePng(name: string, image: HTMLImageElement): Promise<void> {
  const drawn = new Image();
  drawn.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(plainSvg(image))}`;
  await drawn.decode();
  const canvas = document.createElement("canvas");
  const scale = 2400 / drawn.naturalWidth;
  canvas.width = 2400;
  canvas.height = Math.round(drawn.naturalHeight * scale);
  const context = canvas.getContext("2d")!;
  context.fillStyle = "#ffffff";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(drawn, 0, 0, canvas.width, canvas.height);
  canvas.toBlob((blob) => blob && save(`${name}.png`, blob));
}

/** Buttons of pictures, tables and texts. */
export function listen(): void {
  document.addEventListener("click", (event) => {
    const button = (event.target as Element).closest("button");
    const figure = button?.closest("figure");
    if (!button || !figure) return;
    if (button.dataset.save) {
      const image = figure.querySelector("img")!;
      const name = image.dataset.name!;
      if (button.dataset.save === "svg") save(`${name}.svg`, plainSvg(image), "image/svg+xml");
      else void savePng(name, image);
    } else if (button.dataset.table !== undefined) {
      const rows = [...figure.querySelectorAll("tr")].map((row) => [...row.cells].map((cell) => cell.textContent ?? ""));
      save(`${button.dataset.table.replace(/\W+/g, "_")}.csv`, csv(rows));
    } else if (button.dataset.copy !== undefined) {
      copy(button, figure.querySelector("pre")!);
    }
  });
}

function copy(button: HTMLButtonElement, text: HTMLElement): void {
  const say = (word: string) => {
    button.textContent = word;
    setTimeout(() => (button.textContent = "Copy"), 1500);
  };
  // A page in a frame may not have the clipboard: then the text is marked for the reader to copy.
  const mark = () => {
    getSelection()?.selectAllChildren(text);
    say("Marked");
  };
  if (navigator.clipboard) navigator.clipboard.writeText(text.textContent ?? "").then(() => say("Copied"), mark);
  else mark();
}
