"""How the page looks: one measure of text, thin axes, tabular figures; light, dark and on paper."""

from __future__ import annotations

from simulator.report.palette import DARK, LIGHT, rules, variables

LIGHT_VARIABLES = (
    "--page:#ffffff;--ink:#16191d;--soft:#5a636e;--faint:#e4e7eb;--line:#c3c9d1;--panel:#f6f7f9;"
    "--alert-ink:#7a4a00;--alert:#fff3d6;--found:#2c7fb8;--eviction:#f0a860;--load_trade:#8c96a3;--staleness:#c8577a;"
    "--wins:#cfe3f5;--tied:#eceef1;--beaten:#f8d9cb;"
)
DARK_VARIABLES = (
    "--page:#14171b;--ink:#e8eaed;--soft:#a2abb6;--faint:#2a2f36;--line:#464d57;--panel:#1c2026;"
    "--alert-ink:#ffd78a;--alert:#3a2c0c;--found:#4a9ad4;--eviction:#d98f43;--load_trade:#7d8794;--staleness:#cf6384;"
    "--wins:#173a57;--tied:#2a2f36;--beaten:#552b1a;"
)
LAYOUT = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);
  font:14px/1.45 Inter,"Segoe UI",Roboto,"Helvetica Neue",Arial,"Liberation Sans",sans-serif;font-variant-numeric:tabular-nums}
main{max-width:1160px;margin:0 auto;padding:18px 24px 56px}
code,pre{font-family:ui-monospace,Menlo,Consolas,"Liberation Mono","DejaVu Sans Mono",monospace;font-size:12px}
code{overflow-wrap:anywhere}
pre{background:var(--panel);padding:10px 12px;margin:0 0 12px;white-space:pre-wrap;overflow-wrap:anywhere;border-radius:4px}
.kind{margin:0 0 6px;color:var(--soft);font-size:12px}
h1{font-size:25px;line-height:1.25;font-weight:650;letter-spacing:-.01em;margin:0 0 14px;max-width:60em;overflow-wrap:anywhere;
  text-wrap:balance}
h2{font-size:17px;line-height:1.3;font-weight:650;margin:0 0 2px}
h3{font-size:14px;font-weight:650;margin:18px 0 4px}
section{margin-top:44px}
section>p{text-wrap:pretty;margin:0 0 10px;color:var(--soft);max-width:52em}
.absent{color:var(--soft);font-style:italic}
.exploratory{display:flex;flex-wrap:wrap;align-items:center;gap:4px 10px;margin:0 0 8px;color:var(--alert-ink)}
.exploratory strong{background:var(--alert);border:1px solid currentColor;border-radius:3px;padding:0 8px;font-size:13px}
.facts{display:flex;flex-wrap:wrap;gap:6px 28px;margin:0 0 16px;padding:8px 0;
  border-top:1px solid var(--faint);border-bottom:1px solid var(--faint)}
.facts div{min-width:0}
dt{color:var(--soft);font-size:12px}
dd{margin:0;overflow-wrap:anywhere}
.terms{display:grid;grid-template-columns:150px minmax(0,1fr);gap:6px 20px;margin:0;max-width:960px}
.terms dt{font-size:14px;overflow-wrap:anywhere}
.notes{margin:12px 0 0;padding-left:18px;max-width:960px}
"""
TABLES = """
table{border-collapse:collapse;width:100%}
th,td{padding:2px 8px;text-align:left;vertical-align:middle;font-weight:400}
thead th{color:var(--soft);font-size:12px;line-height:1.3;vertical-align:bottom;padding-bottom:5px;border-bottom:1px solid var(--line)}
tbody tr{border-bottom:1px solid var(--faint)}
th:first-child,td:first-child{padding-left:0}
th:last-child,td:last-child{padding-right:0}
small{font-size:11px;color:var(--soft)}
.figure{text-align:right;white-space:nowrap}
thead .figure{white-space:normal}
.range{color:var(--soft)}
.place{width:24px;color:var(--soft);text-align:right}
.policy{line-height:1.3;overflow-wrap:anywhere}
.swatch{display:inline-block;width:9px;height:9px;border-radius:2px;background:var(--policy);margin-top:5px}
.swatch.outlined1{background:none;border:2px solid var(--policy)}
.swatch.outlined2{background:none;border:2px dotted var(--policy)}
.name{display:grid;grid-template-columns:16px minmax(0,1fr)}
.name .spec{display:block;font-size:11px;color:var(--soft);font-weight:400}
.tag{font-size:11px;color:var(--soft);border:1px solid var(--line);border-radius:3px;padding:0 4px;}
.cell{padding:0;position:relative}
tbody .cell{height:24px}
tbody .cell>svg{position:absolute;inset:0;width:100%;height:100%}
.standing{white-space:nowrap}
td.standing.beaten{white-space:normal;overflow-wrap:anywhere;color:var(--soft)}
td.best{font-weight:650}
tr.best code{font-weight:650}
.ranking td,.ranking tbody th{height:27px}
.ranking .policy{width:23%}.ranking .cell{width:35%}.ranking td.standing{width:13%}
tr.bound,tr.bound *{color:var(--soft);font-style:italic}
.key{margin:6px 0 0;color:var(--soft);font-size:12px}
.forests{table-layout:fixed}
.forests col.policy{width:23%}.forests col.figure{width:66px}
.forests td .absent{padding-left:10px}
.forests td.figure{padding-right:2px}
.forests thead th,.heat thead th{vertical-align:bottom}
.bars .cell{width:40%}.bars .policy{width:23%}
.heat{table-layout:fixed;max-width:860px}
.heat td{border:2px solid var(--page);padding:6px 12px;line-height:1.35}
.heat td span{display:block;font-size:12px}
.heat tbody tr{border:0}
.heat-wins{background:var(--wins)}.heat-tied{background:var(--tied)}.heat-beaten{background:var(--beaten)}
.origin{width:auto;max-width:100%}.origin th{color:var(--soft);white-space:nowrap;vertical-align:top}.origin td{overflow-wrap:anywhere}
details{margin-top:14px}summary{cursor:pointer;color:var(--soft)}
.pairs{width:auto;margin-top:6px}
"""
DRAWINGS = """
svg{display:block}
svg text{font-size:11px;fill:var(--soft)}
.plot{overflow:visible}
.grid{stroke:var(--faint)}.one{stroke:var(--soft)}
.interval{stroke:var(--policy);stroke-width:2}
.replicate{stroke:var(--policy);stroke-opacity:.28}
.mark{fill:var(--policy);stroke:var(--policy);stroke-width:1.8}.hollow{fill:var(--page)}
.arrow{fill:var(--policy)}
line.bound{stroke:var(--soft);stroke-width:2;stroke-dasharray:3 2}
.bar{fill:var(--policy,var(--line))}.ceiling{stroke:var(--ink);stroke-width:2}.tail{stroke:var(--policy);stroke-width:2}
rect.found{fill:var(--found)}rect.eviction{fill:var(--eviction)}rect.load_trade{fill:var(--load_trade)}rect.staleness{fill:var(--staleness)}
i.found{background:var(--found)}i.swatch{margin:0 5px 0 0}
i.eviction{background:var(--eviction)}i.load_trade{background:var(--load_trade)}
i.staleness{background:var(--staleness)}
.curves{width:100%;max-width:960px;height:auto}
.curve{fill:none;stroke:var(--policy);stroke-width:1.8;stroke-linejoin:round}
.leader{fill:none;stroke:var(--policy);stroke-width:.8;stroke-opacity:.7}
.curves .name{font:12px ui-monospace,Menlo,Consolas,"Liberation Mono","DejaVu Sans Mono",monospace;fill:var(--policy)}
"""
PAPER = """
@media print{
  @page{margin:14mm}
  main{max-width:none;padding:0;zoom:.82}section{margin-top:22px}
  h2{break-after:avoid}tr,svg,table.heat{break-inside:avoid}thead{display:table-header-group}
  *{-webkit-print-color-adjust:exact;print-color-adjust:exact}
}
"""


def sheet() -> str:
    """The style sheet."""
    light = f":root{{color-scheme:light dark;{LIGHT_VARIABLES}{variables(LIGHT)}}}"
    dark = f"@media screen and (prefers-color-scheme:dark){{:root{{{DARK_VARIABLES}{variables(DARK)}}}}}"
    return "\n".join([light, dark, rules(), LAYOUT.strip(), TABLES.strip(), DRAWINGS.strip(), PAPER.strip()])


__all__ = ["sheet"]
