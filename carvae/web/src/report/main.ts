// The report's script: the map, and the buttons of pictures, tables and texts.
import { Cells } from "./data";
import { CellMap } from "./map";
import { listen } from "./save";

listen();
const header = document.getElementById("header");
const values = document.getElementById("values");
const stage = document.getElementById("cellmap");
if (header && values && stage) void start(header.textContent ?? "", values.textContent ?? "", stage);

async function start(text: string, packed: string, place: HTMLElement): Promise<void> {
  if (!document.createElement("canvas").getContext("webgl")) return; // the picture stays
  try {
    const cells = await Cells.read(text, packed);
    place.hidden = false;
    new CellMap(cells);
    document.body.classList.add("mapped"); // the picture and its note go, on screen
  } catch (error) {
    place.hidden = true;
    console.error(error);
  }
}
