// The page: which view is shown is in the address, so that a reload loses nothing.

import { type About, ask, Refused } from "./api";
import { h } from "./dom";
import { home } from "./home";
import { JobView } from "./job";

const main = document.getElementById("main") as HTMLElement;
let view: JobView | null = null;
let about: About | null = null;

async function show(): Promise<void> {
  view?.close();
  view = null;
  const [kind, id] = location.hash.slice(1).split("/");
  try {
    about ??= await ask<About>("GET", "/api/about");
    if (kind === "job" && id) {
      view = new JobView(id, about);
      main.replaceChildren(view.element);
      await view.open();
    } else {
      main.replaceChildren(await home(about));
      document.title = "carvae";
    }
  } catch (error) {
    const sentence = error instanceof Error ? error.message : String(error);
    const back = error instanceof Refused && error.status === 404;
    main.replaceChildren(
      h("h1", { tabindex: -1 }, "This cannot be shown"),
      h("p", { class: "alert", role: "alert" }, sentence),
      back && h("p", {}, h("a", { href: "#" }, "Give another file")) || "",
    );
  }
  main.querySelector("h1")?.focus();
}

if (location.search) history.replaceState(null, "", `/${location.hash}`); // the token is in a cookie now
document.querySelector(".skip")?.addEventListener("click", (event) => {
  event.preventDefault(); // the address names the job, and is not to name the content
  main.focus();
});
addEventListener("hashchange", () => void show());
void show();
