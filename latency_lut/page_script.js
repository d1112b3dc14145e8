// Figures are drawn once the page is laid out. On a touch screen a finger on a figure scrolls the page instead of zooming.
const touch = window.matchMedia("(pointer: coarse)").matches, plots = { {{- plots | safe -}} };
for (const [name, { data, layout }] of Object.entries(plots)) {
  const config = { responsive: true, displaylogo: false, displayModeBar: touch ? false : "hover", modeBarButtons: [["toImage", "resetScale2d"]] };
  config.toImageButtonOptions = { filename: name, scale: 2 };
  if (touch) layout.dragmode = false;
  Plotly.newPlot("figure-" + name, data, layout, config);
}
