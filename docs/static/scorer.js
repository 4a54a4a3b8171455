// Sphinx loads this before its search: the definition of a name first, then the glossary and pages of that title.
var Scorer = {
  score: ([docname, title, anchor, description, score, filename, kind]) => {
    const query = (new URLSearchParams(window.location.search).get("q") || "")
      .trim().toLowerCase().replace(/\(\)$/, "");
    const last = title.toLowerCase().split(".").pop();
    if (docname === "changelog" || docname.startsWith("generated/course/")) score = Math.min(score, 14) / 2;
    const whole = last === query || title.toLowerCase() === query;
    if (kind === "object") return whole ? (title.split(".").length > 3 ? 400 : 1000) + score : score; // members later
    if (kind === "index") return score >= 100 ? 500 : score / 2;
    if (kind === "title" && (title.toLowerCase() === query || title.toLowerCase().endsWith("> " + query))) return 300;
    return score;
  },
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
