document.documentElement.classList.add('js');
const sliders = [...document.querySelectorAll('.card .slider input')];
function show(slider) {
  const card = slider.closest('.card');
  card.querySelectorAll('.views figure').forEach((figure, number) => {
    figure.hidden = number !== Number(slider.value);
    if (!figure.hidden) {
      const title = figure.querySelector('figcaption').textContent;
      card.querySelector('output').textContent = title;
      slider.setAttribute('aria-valuetext', title);
    }
  });
}
sliders.forEach(slider => { slider.addEventListener('input', () => show(slider)); show(slider); });
const all = document.getElementById('all');
function showAll() {
  sliders.forEach(slider => { slider.value = all.value; show(slider); });
  all.setAttribute('aria-valuetext', sliders[0].getAttribute('aria-valuetext'));
}
if (all) { all.addEventListener('input', showAll); showAll(); }
const specs = document.getElementById('specs');
if (specs) {
  const places = document.querySelectorAll('.vega');
  JSON.parse(specs.textContent).forEach((spec, number) => {
    vegaEmbed(places[number], spec, {mode: 'vega-lite', actions: false, renderer: 'svg'});
  });
}
