"""The style sheet of the page: light and dark, paper and phone."""

CSS = """\
:root { color-scheme: light dark; --ink: #1b1e23; --soft: #59616d; --pale: #b9bec7;
  --paper: #fffffe; --line: #dfe2e7; --tint: #f4f6f8; --warn: #b34700; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8ec; --soft: #a3abb8; --pale: #5b6370; --paper: #15181d; --line: #2c323b;
    --tint: #1d2128; --warn: #ff9a57; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.6rem 1.1rem 4rem; max-width: 68rem; background: var(--paper);
  color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, "DejaVu Sans", sans-serif;
  }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .2rem; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .5rem; }
p { margin: .4rem 0; max-width: 46rem; }
.lead, .note { color: var(--soft); }
.note { font-size: .86rem; }
.findings { padding: 0; margin: 1.1rem 0; list-style: none; }
.findings li { padding: .55rem .9rem; margin: .45rem 0; background: var(--tint);
  border-left: 4px solid #2b7fb8; border-radius: 0 4px 4px 0; max-width: 52rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .34rem .7rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; vertical-align: top; }
thead th { font-weight: 600; vertical-align: bottom; border-bottom: 2px solid var(--pale); }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--paper);
  font-weight: 600; max-width: 16rem; overflow: hidden; text-overflow: ellipsis; }
td small, th small { display: block; color: var(--soft); font-size: .76rem; font-weight: 400; }
tr.total > * { border-top: 2px solid var(--pale); }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(15.5rem, 100%), 1fr));
  gap: 1rem; }
.gallery { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr));
  gap: 1.4rem; }
figure { margin: .6rem 0; }
.panels figure { margin: 0; }
svg { width: 100%; height: auto; display: block; }
details { margin: .8rem 0; }
summary { cursor: pointer; font-weight: 600; }
dl { font-size: .9rem; max-width: 52rem; }
dt { font-weight: 600; margin-top: .5rem; }
dd { margin: 0; color: var(--soft); }
footer { margin-top: 2.5rem; padding-top: .7rem; border-top: 1px solid var(--line);
  color: var(--soft); font-size: .86rem; overflow-wrap: anywhere; }
@media (max-width: 40rem) { body { padding: 1rem .8rem 3rem; } table { font-size: .84rem; }
  th, td { padding: .3rem .45rem; } .findings li { padding: .45rem .7rem; } th:first-child {
  max-width: 7.5rem; } }
@media print { body { max-width: none; padding: 0; font-size: 11pt; } figure, tr, li {
  break-inside: avoid; } details > * { display: block; } }
"""
