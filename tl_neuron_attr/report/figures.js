// Figures are drawn when they come into view, in the colours of the reader's system.
const Figures = (() => {
  const hovers = window.matchMedia('(hover: hover)').matches;
  const dark = window.matchMedia('(prefers-color-scheme: dark)');
  const BRIGHTER = { '#222222': '#e6edf3', '#004488': '#5b9bd5', '#332288': '#9a8cf0',
    '#762A83': '#b678c4', '#1B7837': '#4fb36b', '#117733': '#3fae6a', '#882255': '#d4609a' };
  const drawn = new Set(), changes = {};

  function styled(layout) {
    const css = getComputedStyle(document.documentElement);
    const colour = name => css.getPropertyValue(name).trim();
    const copy = structuredClone(layout);
    const gaps = copy.plot_bgcolor;  // the grey of cells that are not in the table says something
    copy.paper_bgcolor = 'rgba(0,0,0,0)';
    copy.plot_bgcolor = gaps && gaps !== 'white' ? gaps : 'rgba(0,0,0,0)';
    copy.font = { color: colour('--ink'), size: 12 };
    copy.autosize = true;
    delete copy.width;
    copy.modebar = { bgcolor: 'rgba(0,0,0,0)', color: colour('--soft'),
      activecolor: colour('--ink') };
    copy.hoverlabel = { bgcolor: colour('--band'), bordercolor: colour('--line'),
      font: { color: colour('--ink') } };
    if (!hovers) copy.dragmode = false;  // a finger on a figure scrolls the page
    if (dark.matches) (copy.annotations || []).forEach(({ font }) => {
      if (font && font.color) font.color = BRIGHTER[font.color] || font.color;
    });
    const narrow = window.innerWidth < 640;
    if (narrow && copy.margin) { copy.margin.l = 44; copy.margin.r = 8; }
    const [one, two] = [copy.xaxis, copy.xaxis2].map(axis => axis && axis.domain);
    const beside = one && two && two[0] >= one[1];  // plots next to each other, their titles too
    Object.keys(copy).filter(key => /^[xy]axis/.test(key)).forEach(key => {
      const axis = copy[key];
      if (axis.gridcolor === undefined) axis.gridcolor = colour('--line');
      axis.linecolor = colour('--line');
      if (axis.ticks === 'outside' && axis.tickcolor === 'white') {
        axis.tickcolor = 'rgba(0,0,0,0)';
      }
      axis.automargin = true;
      if (narrow && beside && key[0] === 'x' && axis.title && axis.title.text) {
        axis.title.text = axis.title.text.replace(/(\S+ \S+ \S+|\S+) /g, '$1<br>');
      }
    });
    return copy;
  }

  // dark lines, bars and marks would sink into a dark page; the colours of cells stay as they are
  function traces(data) {
    if (!dark.matches) return data;
    const copy = structuredClone(data);
    copy.filter(trace => trace.marker && trace.marker.colorscale).forEach(({ marker }) => {
      marker.colorscale = marker.colorscale.map(([at, hue]) => [at, BRIGHTER[hue] || hue]);
      if (marker.opacity) marker.opacity = 0.85;
    });
    const parts = trace => trace.type === 'sankey' ? [trace.node, trace.textfont]
      : [trace, trace.marker, trace.line, trace.marker && trace.marker.line];
    copy.forEach(trace => parts(trace).filter(Boolean).forEach(part => {
      if (typeof part.color === 'string') part.color = BRIGHTER[part.color] || part.color;
      if (Array.isArray(part.color)) part.color = part.color.map(each => BRIGHTER[each] || each);
    }));
    return copy;
  }

  const source = id => document.querySelector(`script[data-for="${id}"]`);

  function draw(id) {
    let figure = JSON.parse(source(id).textContent);
    if (changes[id]) figure = changes[id](figure);
    drawn.add(id);
    return Plotly.react(id, traces(figure.data), styled(figure.layout),
      { responsive: true, displaylogo: false, displayModeBar: hovers ? 'hover' : false,
        showSendToCloud: false,  // plotly's own button would send the data to a host
        modeBarButtonsToRemove: ['select2d', 'lasso2d', 'sendDataToCloud', 'sendChartToCloud'] });
  }

  // change: figure -> figure, from now on; null for the figure as it was made
  function change(id, made) {
    changes[id] = made;
    if (drawn.has(id)) draw(id);
  }

  // once plotly.js is there
  function start() {
    if (window.Plotly) Plotly.setPlotConfig({ logging: 0 });  // it warns of colours by number
    const plots = [...document.querySelectorAll('.plot')].filter(plot => source(plot.id));
    const seen = new IntersectionObserver(entries => entries.forEach(entry => {
      if (!entry.isIntersecting || drawn.has(entry.target.id)) return;
      seen.unobserve(entry.target);
      draw(entry.target.id);
    }), { rootMargin: '300px' });
    plots.forEach(plot => seen.observe(plot));
    dark.addEventListener('change', () => drawn.forEach(draw));
    window.addEventListener('beforeprint', () => plots.forEach(plot => draw(plot.id)));
  }

  return { start, change };
})();
