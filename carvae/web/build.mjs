// Bundles the pages' scripts and styles into ../web/assets, minified; scripts/build_web.sh runs it.
import { copyFileSync, existsSync } from "node:fs";
import { build } from "esbuild";

const pages = ["app", "report"].filter((page) => existsSync(`src/${page}/main.ts`));
await build({
  entryPoints: pages.flatMap((page) => [
    { in: `src/${page}/main.ts`, out: page },
    { in: `src/${page}/style.css`, out: page },
  ]),
  outdir: "assets",
  bundle: true,
  minify: true,
  format: "iife",
  target: ["es2022"],
  charset: "utf8",
  legalComments: "inline",
});
copyFileSync("src/app/index.html", "assets/index.html");
