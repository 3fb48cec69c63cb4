(function () {
  var hovers = window.matchMedia('(hover: hover)').matches;
  var dark = window.matchMedia('(prefers-color-scheme: dark)');
  function colours() {
    var css = getComputedStyle(document.documentElement);
    return { ink: css.getPropertyValue('--ink').trim(),
      line: css.getPropertyValue('--line').trim(),
      soft: css.getPropertyValue('--soft').trim() };
  }
  function styled(layout) {
    var c = colours(), copy = JSON.parse(JSON.stringify(layout));
    copy.paper_bgcolor = 'rgba(0,0,0,0)';
    copy.plot_bgcolor = 'rgba(0,0,0,0)';
    copy.font = { color: c.ink, size: 12 };
    copy.autosize = true;
    copy.modebar = { bgcolor: 'rgba(0,0,0,0)', color: c.soft, activecolor: c.ink };
    if (!hovers) copy.dragmode = false;  // a finger on a figure scrolls the page
    if (window.innerWidth < 640 && copy.margin) { copy.margin.l = 44; copy.margin.r = 8; }
    Object.keys(copy).forEach(function (key) {
      if (/^[xy]axis/.test(key)) {
        if (copy[key].gridcolor === undefined) copy[key].gridcolor = c.line;
        copy[key].linecolor = c.line;
        copy[key].automargin = true;
      }
    });
    return copy;
  }
  function traces(data) {
    if (!dark.matches) return data;
    var copy = JSON.parse(JSON.stringify(data));
    copy.forEach(function (trace) {
      if (trace.line && trace.line.color === '#222222') trace.line.color = '#e6edf3';
      if (trace.marker && trace.marker.color === '#004488') trace.marker.color = '#5b9bd5';
      if (trace.line && trace.line.color === '#004488') trace.line.color = '#5b9bd5';
    });
    return copy;
  }
  function draw() {
    document.querySelectorAll('script[data-for]').forEach(function (source) {
      var figure = JSON.parse(source.textContent);
      Plotly.react(source.dataset.for, traces(figure.data), styled(figure.layout),
        { responsive: true, displaylogo: false, displayModeBar: hovers ? 'hover' : false,
          modeBarButtonsToRemove: ['select2d', 'lasso2d', 'sendDataToCloud'] });
    });
  }
  draw();
  if (dark.addEventListener) dark.addEventListener('change', draw);
})();
