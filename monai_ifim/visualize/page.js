// Tables are sorted by a button in each heading. Without scripts the page is complete, in the order that was written.
"use strict";
const raised = "⁰¹²³⁴⁵⁶⁷⁸⁹";
// The first number of a cell, greater than all where it says that none was found; text without one is null.
function numberOf(text) {
  const plain = text.trim().replace(/−/g, "-").replace(/\s*×\s*10([⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+)/g, (_, power) =>
    "e" + [...power].map((sign) => sign === "⁻" ? "-" : raised.indexOf(sign)).join(""));
  if (/^(∞|none|above)/.test(plain)) return Infinity;
  const found = /^(?:[<>] |p [=<] )?(-?\d+(?:\.\d+)?(?:e-?\d+)?)/.exec(plain);
  return found ? Number(found[1]) : null;
}
function sort(table, column, heading) {
  const falling = heading.getAttribute("aria-sort") === "ascending";
  const rows = [...table.tBodies[0].rows].map((row) => {
    const text = row.cells[column].textContent.trim();
    return { row, text, number: numberOf(text) };
  });
  const cellsAreNames = rows.some(({ row }) => row.cells[column].classList.contains("file"));
  const empty = (text) => ["", "–", "p –", "not measurable", "not tested", "no label"].includes(text);
  const numeric = !cellsAreNames && rows.every(({ text, number }) => number !== null || empty(text));
  const compare = (one, other) => {
    if (empty(one.text) || empty(other.text)) return empty(one.text) - empty(other.text); // always last
    const order = !numeric ? one.text.localeCompare(other.text, "en", { numeric: true })
      : one.number === other.number ? 0 : one.number < other.number ? -1 : 1;
    return falling ? -order : order;
  };
  table.tBodies[0].append(...rows.sort(compare).map(({ row }) => row));
  for (const other of heading.parentNode.cells) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", falling ? "descending" : "ascending");
}
for (const table of document.querySelectorAll("table:not(.facts)")) {
  if (!table.tHead || table.tBodies[0].rows.length < 2) continue;
  [...table.tHead.rows[0].cells].forEach((heading, column) => {
    const button = document.createElement("span"); // browsers do not print a real button again on the next page
    button.setAttribute("role", "button");
    button.tabIndex = 0;
    button.title = "Sort by this column";
    button.append(...heading.childNodes);
    button.addEventListener("click", () => sort(table, column, heading));
    button.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault(); // a blank would scroll the page
      sort(table, column, heading);
    });
    heading.append(button);
  });
}
