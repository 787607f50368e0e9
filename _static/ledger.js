// The filters of the ledger. Without this script the page shows every row.
(() => {
  const form = document.querySelector(".polylib-ledger-filter");
  if (!form) return;
  const rows = [...document.querySelectorAll("table.polylib-ledger tbody tr")];
  const show = () => {
    const { part, verdict, text } = Object.fromEntries(new FormData(form));
    const words = text.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const content = row.textContent.toLowerCase();
      row.hidden =
        (part && row.dataset.part !== part) ||
        (verdict && !row.dataset.verdicts.split("|").includes(verdict)) ||
        !words.every((word) => content.includes(word));
      shown += !row.hidden;
    }
    form.querySelector("output").textContent = `${shown} of ${rows.length} claims`;
  };
  form.addEventListener("input", show);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  show();
})();
