// node axe.cjs HTML_FOLDER PAGE...: looks at pages in Chromium, on a desktop and on a telephone, light
// and dark, from files and without a network. Exits with 1 for an error in the console, a page that
// is wider than its window, or a violation that axe calls serious or critical.
const path = require("path");
const puppeteer = require("puppeteer-core");
const axe = require("axe-core").source;

const [folder, ...pages] = process.argv.slice(2);
const views = [[1280, "light"], [1280, "dark"], [390, "light"], [390, "dark"]];

async function look(browser, name, width, theme) {
  const visit = await browser.createBrowserContext();  // as a reader who comes for the first time
  const page = await visit.newPage(), faults = [];
  page.on("console", (message) => message.type() === "error" && faults.push(message.text()));
  page.on("pageerror", (error) => faults.push(`${error}`));
  page.on("request", (request) => /^https?:/.test(request.url()) && faults.push(`asks ${request.url()}`));
  await page.setViewport({ width, height: 900 });
  await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: theme }]);
  await page.goto(`file://${path.resolve(folder, name)}`, { waitUntil: "load" });
  await page.evaluate(() => document.querySelectorAll("details").forEach((part) => { part.open = true; }));
  await new Promise((resolve) => setTimeout(resolve, 500));  // until colors have settled
  const mode = await page.evaluate(() => document.documentElement.dataset.theme);
  if (mode !== theme) faults.push(`is shown ${mode}`);
  const wider = await page.evaluate(() => document.documentElement.scrollWidth - window.innerWidth);
  if (wider > 0) faults.push(`${wider} pixels wider than its window`);
  const silent = await page.evaluate(() => [...document.querySelectorAll(".bd-article table:not(.scrolled)")]
    .filter((table) => table.scrollWidth > table.clientWidth + 1).length);
  if (silent) faults.push(`${silent} tables scroll and do not say so`);
  await page.evaluate(axe);
  const { violations } = await page.evaluate(() => axe.run(document, { resultTypes: ["violations"], preload: false }));
  for (const { id, impact, help, nodes } of violations) {
    if (impact === "serious" || impact === "critical") {
      faults.push(`${id} (${impact}): ${help}; ${nodes.length} times, such as ${nodes.slice(0, 3).map(({ html }) => html.slice(0, 200)).join(" ")}`);
    }
  }
  await visit.close();
  return faults.map((fault) => `${name}, ${width} pixels, ${theme}: ${fault}`);
}

(async () => {
  const browser = await puppeteer.launch({ executablePath: process.env.CHROMIUM, args: ["--no-sandbox"] });
  const left = pages.flatMap((name) => views.map((view) => [name, ...view])), faults = [];
  await Promise.all(Array.from({ length: 4 }, async () => {  // so many at once: most of it is waiting
    while (left.length) faults.push(...await look(browser, ...left.shift()));
  }));
  await browser.close();
  console.log(faults.join("\n") || `axe finds nothing serious on ${pages.length} pages`);
  process.exit(faults.length ? 1 : 0);
})();
