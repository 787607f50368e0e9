// Draws the book's figures and sweeps in the built site: no kernel, no network, plotly.js from the site's own folder.
(function () {
  "use strict";

  const here = document.currentScript.src;
  const narrow = 560; // pixels; below this, panels are stacked

  const theme = () => {
    const chosen = document.documentElement.dataset.theme;
    if (chosen === "dark" || chosen === "light") return chosen;
    return window.matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  };

  // A packed figure (see pack() in figures.py) back to plotly's form. Typed arrays stay in base64: plotly decodes them.
  function unpack(content, number) {
    const [skeleton, ...arrays] = content.figures[number];
    let next = 0;
    const fill = (value) => {
      if (Array.isArray(value)) return value.map(fill);
      if (value === null || typeof value !== "object") return value;
      if (value.$) {
        const stored = content.arrays[arrays[next++]];
        const array = typeof stored === "string" ? { dtype: "f4", bdata: stored } : { ...stored };
        if (value.$.length === 2) array.shape = value.$.join(", ");
        return array;
      }
      return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, fill(item)]));
    };
    return fill(content.skeletons[skeleton]);
  }

  // Side-by-side panels become a column. Titles are in the coordinates of their panels, so they follow.
  function stack(layout) {
    const axes = Object.keys(layout).filter((key) => /^xaxis\d*$/.test(key) && layout[key].domain);
    axes.sort((a, b) => layout[a].domain[0] - layout[b].domain[0]);
    if (axes.length < 2) return;
    const gap = 0.4 / axes.length;
    const height = (1 - gap * (axes.length - 1)) / axes.length;
    axes.forEach((key, row) => {
      const top = 1 - row * (height + gap);
      layout[key].domain = [0, 1];
      layout[key.replace("x", "y")].domain = [top - height, top];
    });
    layout.height = (layout.height || window.polylibTemplates.light.layout.height) * axes.length * 0.85;
  }

  // Titles begin at the left end of their panel and break where the next panel, or the page, begins. Where that is, is
  // known after drawing. The next drawing of the plot begins with titles that broke like the last ones: it is the only
  // one, unless they are others or the width is another.
  const broken = new WeakMap(); // for each plot, its titles and how they broke

  function fitTitles(place, notes, drawn) {
    const axes = Object.entries(place._fullLayout).filter(([name]) => /^xaxis\d*$/.test(name));
    const starts = Object.fromEntries(axes.map(([name, axis]) => [name.replace("axis", ""), axis._offset]));
    const changes = {};
    const titles = {};
    notes.forEach((note, number) => {
      const axis = /^(x\d*) domain$/.exec(note.xref || "");
      if (!axis || note.showarrow !== false) return;
      const start = starts[axis[1]];
      const end = Math.min(place.clientWidth, ...Object.values(starts).filter((other) => other > start + 1));
      const text = wrap(note.text, Math.floor((end - start) / 8.5));
      titles[note.text] = text;
      if (text !== drawn[number]) changes[`annotations[${number}].text`] = text;
    });
    broken.set(place, titles);
    return Object.keys(changes).length ? window.Plotly.relayout(place, changes) : null;
  }

  // Break a text into lines of at most this many letters.
  function wrap(text, letters) {
    const lines = [""];
    for (const word of text.split(" ")) {
      const longer = `${lines[lines.length - 1]} ${word}`.trim();
      if (longer.length <= letters) lines[lines.length - 1] = longer;
      else lines.push(word);
    }
    return lines.join("<br>");
  }

  function draw(place, figure) {
    const layout = { ...figure.layout, template: window.polylibTemplates[theme()], autosize: true };
    for (const key of Object.keys(layout)) if (/axis\d*$/.test(key)) layout[key] = { ...layout[key] };
    if (place.clientWidth < narrow) {
      stack(layout);
      // The legend moves below, where long names take a line each; on a desk its room was above.
      const named = figure.data.filter((trace) => trace.name && trace.showlegend !== false).length;
      const more = layout.showlegend === false ? 0 : 22 * Math.max(0, named - 3);
      layout.height = (layout.height || window.polylibTemplates.light.layout.height) + more;
      layout.margin = { l: 50, r: 10, b: 110 + more, ...layout.margin, t: 60 };
      layout.legend = { yref: "container", y: 0, yanchor: "bottom", ...layout.legend };
    }
    // When the window changes its width, plotly gives the figure the height of its place.
    place.style.height = layout.height ? `${layout.height}px` : "";
    const notes = figure.layout.annotations || [];
    const titles = broken.get(place) || {};
    layout.annotations = notes.map((note) => (note.text in titles ? { ...note, text: titles[note.text] } : { ...note }));
    const drawn = layout.annotations.map((note) => note.text); // plotly changes the layout that it is given
    const options = { responsive: true, displaylogo: false, displayModeBar: false };
    return window.Plotly.react(place, figure.data, layout, options).then(() => fitTitles(place, notes, drawn));
  }

  const redraws = []; // what to do when the theme or the width changes

  function mount(element) {
    const content = JSON.parse(element.querySelector("script[type='application/json']").textContent);
    element.polylib = { figures: content.figures.length, unpack: (number) => unpack(content, number) }; // to look into
    const place = document.createElement("div");
    place.className = "polylib-plot";
    let number = 0;
    if (element.classList.contains("polylib-sweep")) {
      const controls = document.createElement("div");
      controls.className = "polylib-controls";
      const sliders = content.knobs.map((knob) => slider(controls, knob));
      const move = () => {
        number = sliders.reduce((at, input, k) => at * content.knobs[k].values.length + Number(input.value), 0);
        sliders.forEach((input, k) => {
          const value = content.knobs[k].values[input.value];
          input.setAttribute("aria-valuetext", value);
          input.nextElementSibling.textContent = value;
        });
        draw(place, unpack(content, number));
      };
      sliders.forEach((input) => input.addEventListener("input", move));
      element.replaceChildren(controls, place);
      move();
    } else {
      element.replaceChildren(place);
      draw(place, unpack(content, 0));
    }
    redraws.push(() => draw(place, unpack(content, number)));
  }

  let serial = 0;
  function slider(controls, knob) {
    const id = `polylib-knob-${serial++}`;
    const label = document.createElement("label");
    label.htmlFor = id;
    label.textContent = knob.label;
    const input = document.createElement("input");
    Object.assign(input, { type: "range", id, min: 0, max: knob.values.length - 1, step: 1 });
    input.value = knob.start;
    const output = document.createElement("output");
    output.htmlFor = id;
    controls.append(label, input, output);
    return input;
  }

  function start() {
    const elements = document.querySelectorAll(".polylib-figure, .polylib-sweep");
    if (elements.length === 0) return;
    const script = document.createElement("script");
    script.src = new URL("plotly.min.js", here).href; // only pages with figures pay for it
    script.onload = () => {
      elements.forEach((element) => {
        try {
          mount(element);
        } catch (error) {
          console.error(error); // the figures after it are drawn all the same
        }
      });
      const again = () => redraws.forEach((redraw) => redraw());
      new MutationObserver(again).observe(document.documentElement, { attributes: true, attributeFilter: ["data-theme"] });
      window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
      let wide = window.innerWidth < narrow;
      window.addEventListener("resize", () => {
        if (wide !== window.innerWidth < narrow) again();
        wide = window.innerWidth < narrow;
      });
    };
    document.head.append(script);
  }

  // On paper the page is light, whatever the reader's theme: the figures follow the attribute as they do on the screen.
  let theirs;
  window.addEventListener("beforeprint", () => {
    theirs = document.documentElement.dataset.theme;
    document.documentElement.dataset.theme = "light";
  });
  window.addEventListener("afterprint", () => {
    if (theirs === undefined) delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theirs;
  });

  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
  else start();
})();
