// Draws every chart of the page. One spec per script element, in the box that follows the same name.
(async () => {
  const specs = [...document.querySelectorAll("script[data-chart]")];
  await Promise.all(specs.map((script) =>
    vegaEmbed(document.getElementById(script.dataset.chart), JSON.parse(script.textContent), {
      renderer: "svg", // takes its colours from the page's style, in light, dark and print
      actions: false,
    })));
  document.documentElement.dataset.drawn = specs.length;
})();
