"use strict";
(() => {
  const root = document.documentElement;
  const plots = JSON.parse(document.getElementById("plots").textContent);

  // Colours are named "@role" in the figures, and are those of the page's design.
  const coloured = (value, style) => {
    if (typeof value === "string") return value.startsWith("@") ? style.getPropertyValue("--" + value.slice(1)).trim() : value;
    if (Array.isArray(value)) return value.map((one) => coloured(one, style));
    if (value && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([key, one]) => [key, coloured(one, style)]));
    return value;
  };

  const axis = (style) => ({ gridcolor: style.getPropertyValue("--line").trim(), zerolinecolor: style.getPropertyValue("--line").trim(), linecolor: style.getPropertyValue("--line").trim() });

  const draw = () => {
    if (typeof Plotly === "undefined") return;
    const style = getComputedStyle(root);
    for (const place of document.querySelectorAll("[data-plot]")) {
      const { data, layout } = coloured(plots[place.dataset.plot], style);
      const whole = {
        ...layout,
        xaxis: { ...axis(style), automargin: true, ...layout.xaxis },
        yaxis: { ...axis(style), automargin: true, ...layout.yaxis },
        font: { family: "system-ui, sans-serif", size: 12, color: style.getPropertyValue("--ink").trim() },
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
        margin: { l: 60, r: 20, t: 28, b: data.filter((one) => one.showlegend !== false && one.type === "scatter").length > 1 ? 84 : 46 },
        hoverlabel: { align: "left" },
        legend: { orientation: "h", yref: "container", y: 0, yanchor: "bottom", x: 0 },
      };
      Plotly.react(place, data, whole, { displayModeBar: false, responsive: true });
    }
  };

  const theme = () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    draw();
  };

  const copy = async (button) => {
    const text = button.dataset.copy;
    try {
      await navigator.clipboard.writeText(text);
    } catch {  // a page opened as a file may not use the clipboard so
      const area = document.createElement("textarea");
      area.value = text;
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    button.textContent = "copied";
    setTimeout(() => { button.textContent = "copy"; }, 1200);
  };

  const sort = (head) => {
    const table = head.closest("table");
    const place = [...head.parentElement.children].indexOf(head);
    const down = head.getAttribute("aria-sort") !== "descending";
    const content = (row) => row.children[place].dataset.sort ?? row.children[place].textContent.trim();
    const compare = (one, other) => {
      const [left, right] = [content(one), content(other)];
      if (left === "" || right === "") return (left === "") - (right === "");
      const numbers = [Number(left), Number(right)];
      const order = numbers.every(Number.isFinite) ? numbers[0] - numbers[1] : left.localeCompare(right);
      return down ? -order : order;
    };
    const body = table.tBodies[0];
    body.append(...[...body.rows].sort(compare));
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
  };

  document.addEventListener("click", (event) => {
    const button = event.target.closest(".copy");
    if (button) return copy(button);
    const head = event.target.closest(".sortable th:not(.unsorted)");
    if (head) sort(head);
  });
  document.getElementById("theme").addEventListener("click", theme);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  draw();
})();
