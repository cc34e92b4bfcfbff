// Runs before the first paint, as a plain script, so that a chosen theme does not flash.
(() => {
  try {
    const theme = localStorage.getItem("wicore.theme");
    if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
  } catch {
    // Storage may be forbidden; the system's theme is used then.
  }
})();
