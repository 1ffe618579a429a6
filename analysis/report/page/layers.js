// A slider that shows the heat maps of any layer at full size. Without it the last layer is shown, and all in small.
for (const card of document.querySelectorAll("[data-layers]")) {
  const maps = new Map();
  for (const map of card.querySelectorAll("[data-layer]")) {
    const layer = Number(map.dataset.layer);
    if (!maps.has(layer)) maps.set(layer, new Map());
    maps.get(layer).set(map.parentElement.dataset.of, map.querySelector("svg"));
  }
  const layers = [...maps.keys()].sort((a, b) => a - b);
  if (layers.length < 2) continue;

  const label = document.createElement("label");
  label.className = "slider";
  label.append("Layer ");
  const slider = Object.assign(document.createElement("input"), {
    type: "range", min: 0, max: layers.length - 1, value: layers.length - 1,
  });
  const shown = document.createElement("output");
  shown.textContent = layers.at(-1);
  label.append(slider, shown);
  const panels = [...card.querySelectorAll("[data-panel]")];
  panels[0].parentElement.before(label);

  slider.addEventListener("input", () => {
    const layer = layers[slider.value];
    shown.textContent = layer;
    for (const panel of panels) {
      const map = maps.get(layer).get(panel.dataset.panel);
      panel.querySelector("output").textContent = layer;
      panel.querySelector(".map").replaceChildren(...(map ? [map.cloneNode(true)] : []));
    }
  });
}
