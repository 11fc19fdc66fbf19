// Table of contents: open beside the text, closed above it on a narrow page.
const contents = document.querySelector("nav details"), wide = matchMedia("(min-width: 1024px)");
const openContents = () => { contents.open = wide.matches; };
wide.addEventListener("change", openContents);
openContents();
contents.addEventListener("click", event => { if (event.target.closest("a") && !wide.matches) contents.open = false; });

// Dark scheme of the tables.
const dark = matchMedia("screen and (prefers-color-scheme: dark)");
const darken = () => document.documentElement.classList.toggle("dark", dark.matches);
dark.addEventListener("change", darken);
darken();

// Tables that sort and filter, by the library in the script element "datatables".
const LONG = 25;
const library = new Blob([document.getElementById("datatables").textContent], { type: "text/javascript" });
const address = URL.createObjectURL(library);
const { default: DataTable } = await import(address);
URL.revokeObjectURL(address);
for (const table of document.querySelectorAll("table.sortable")) {
  const rows = table.tBodies[0].rows.length;
  const parts = rows > LONG ? { topStart: "pageLength", bottomStart: "info", bottomEnd: "paging" }
    : { topStart: null, bottomStart: null, bottomEnd: null };
  new DataTable(table, {
    order: [], autoWidth: false, paging: rows > LONG, pageLength: LONG, lengthMenu: [LONG, 100, { label: "all", value: -1 }],
    layout: { topEnd: rows > 5 ? "search" : null, ...parts }, columnDefs: [{ targets: "_all", className: "" }],
  });
}
addEventListener("beforeprint", () => {
  for (const claims of document.querySelectorAll("details.findings")) claims.open = true;
  for (const table of document.querySelectorAll("table.sortable")) new DataTable(table).page.len(-1).draw();
});
document.documentElement.dataset.ready = "";
