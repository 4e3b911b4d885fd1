// Light or dark: the system's theme until the button is used.

const dark = matchMedia("(prefers-color-scheme: dark)");

/** Follow the setting `theme`: "auto", "light" or "dark". */
export function bindTheme(state, button) {
  const show = ({ theme }) => {
    document.documentElement.dataset.theme = theme;
  };
  button.addEventListener("click", () => {
    const { theme } = state.values;
    const isDark = theme === "auto" ? dark.matches : theme === "dark";
    state.set({ theme: isDark ? "light" : "dark" });
  });
  state.listen(show);
  show(state.values);
}
