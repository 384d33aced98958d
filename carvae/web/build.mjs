// Bundles the pages' scripts and styles into ../web/assets, minified; scripts/build_web.sh runs it.
import { copyFileSync, existsSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
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

// The licences of what is bundled go along with it: of all that is installed but the tools (a library bundles its own).
const installed = Object.keys(JSON.parse(readFileSync("package-lock.json", "utf8")).packages);
const packages = installed.map((path) => path.replace(/^node_modules\//, "")).filter((name) => name && !/esbuild|typescript/.test(name));
const notices = packages.sort().map((name) => {
  const folder = `node_modules/${name}`;
  const licence = readdirSync(folder).find((file) => file.startsWith("LICENSE"));
  if (!licence) throw new Error(`${name} brings no licence`);
  const { version } = JSON.parse(readFileSync(`${folder}/package.json`, "utf8"));
  return `${name} ${version}\n\n${readFileSync(`${folder}/${licence}`, "utf8").trim()}\n`;
});
writeFileSync("assets/LICENSES.txt", notices.join(`\n${"-".repeat(72)}\n\n`));
