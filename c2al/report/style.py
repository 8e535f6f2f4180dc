"""The page's style sheet: light and dark by the reader's preference."""

CSS = """
:root {
  color-scheme: light dark;
  --page: #ffffff; --ink: #1c2430; --soft: #5d6876; --line: #dfe4ea; --panel: #f5f7f9;
  --better: #1c7f53; --worse: #b8324f; --accent: #c05f1d; --edge: rgba(28, 36, 48, .35);
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #13171c; --ink: #e3e8ee; --soft: #97a3b1; --line: #2c343e; --panel: #1b2128;
    --better: #4cc38a; --worse: #f0748c; --accent: #ef9a5b; --edge: rgba(227, 232, 238, .4);
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
main { max-width: 1040px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.01em; }
h2 { font-size: 1.2rem; margin: 3rem 0 .5rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.6rem 0 .3rem; }
p { margin: .5rem 0 .9rem; max-width: 74ch; }
.soft, figcaption, .note { color: var(--soft); font-size: .9rem; }
.lead { font-size: 1.08rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(230px, 1fr)); gap: .9rem; margin: 1.4rem 0; }
.tile { background: var(--panel); border: 1px solid var(--line); border-radius: 10px; padding: .9rem 1.1rem; }
.tile b { display: block; font-size: .82rem; font-weight: 600; color: var(--soft); }
.tile strong {
  display: block; font-size: 1.85rem; font-weight: 650; line-height: 1.3; font-variant-numeric: tabular-nums;
}
.tile span { display: block; font-size: .86rem; color: var(--soft); font-variant-numeric: tabular-nums; }
.better { color: var(--better); } .worse { color: var(--worse); }
.scroll {  /* a shadow at an edge says that there is more beyond it */
  margin: .8rem 0 1.2rem; overflow-x: auto;
  background:
    linear-gradient(to right, var(--page) 40%, transparent) left / 48px 100% no-repeat local,
    linear-gradient(to left, var(--page) 40%, transparent) right / 48px 100% no-repeat local,
    linear-gradient(to right, var(--edge), transparent) left / 14px 100% no-repeat scroll,
    linear-gradient(to left, var(--edge), transparent) right / 14px 100% no-repeat scroll;
}
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .36rem .5rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { white-space: normal; font-weight: 600; color: var(--soft); vertical-align: bottom; }
td.text, th.text { text-align: left; }
td.wrap { white-space: normal; }
td.text { white-space: normal; overflow-wrap: anywhere; min-width: 6rem; max-width: 24rem; }
tr.chosen td { background: var(--panel); font-weight: 600; }
tr.chosen td:first-child { box-shadow: inset 3px 0 var(--accent); }
figure { margin: 1rem 0 1.6rem; }
.draw svg { width: 100%; height: auto; display: block; }
ul { padding-left: 1.2rem; max-width: 74ch; } li { margin: .25rem 0; }
h1, li, p, figcaption, .tile { overflow-wrap: anywhere; }
pre {
  background: var(--panel); border: 1px solid var(--line); border-radius: 8px;
  padding: .8rem 1rem; overflow-x: auto; font-size: .82rem; line-height: 1.45;
}
pre.tall { max-height: 26rem; overflow: auto; }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
@media (max-width: 600px) {
  main { padding: 1.5rem 1rem 3rem; } h1 { font-size: 1.4rem; } .tile strong { font-size: 1.5rem; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; }
}
@media print {
  :root {
    color-scheme: light; --page: #ffffff; --ink: #1c2430; --soft: #4c5663; --line: #ccd3da; --panel: #f5f7f9;
    --better: #1c7f53; --worse: #b8324f; --accent: #c05f1d;
  }
  html { font-size: 11px; } body { font-size: 1rem; } main { max-width: none; padding: 0; } p, ul { max-width: none; }
  table { font-size: .78rem; } th, td { padding: .2rem .3rem; white-space: normal; }
  .scroll { overflow: visible; background: none; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; overflow: visible; font-size: .75rem; }
  pre.tall { max-height: none; columns: 3; }
  figure, .tile, tr { break-inside: avoid; } h2, h3 { break-after: avoid; } h2 { margin-top: 1.6rem; }
}
"""
