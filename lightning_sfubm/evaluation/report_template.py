"""The HTML of the report as a Jinja template: one file, no scripts, nothing fetched, fit for print."""

CSS = """
:root { --ink: #1f2937; --soft: #6b7280; --line: #e5e7eb; --tint: #f6f8fa; --accent: #0072b2; }
* { box-sizing: border-box; }
body { font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  color: var(--ink); background: #fff; max-width: 1160px; margin: 0 auto; padding: 32px 28px 64px; }
h1 { font-size: 27px; line-height: 1.25; margin: 0 0 4px; letter-spacing: -.01em; }
h2 { font-size: 19px; margin: 44px 0 10px; padding-top: 12px; border-top: 2px solid var(--ink); }
h3 { font-size: 15px; margin: 26px 0 8px; }
p { margin: 8px 0; max-width: 86ch; }
.lead, .note, figcaption, caption { color: var(--soft); }
.note, figcaption, caption { font-size: 13px; }
.warn { border-left: 3px solid #d55e00; background: #fdf3ec; padding: 8px 14px; max-width: 86ch; }
nav { font-size: 13px; margin: 14px 0 0; } nav a { margin-right: 14px; }
a { color: var(--accent); text-decoration: none; } a:hover { text-decoration: underline; }
.scroll { overflow-x: auto; margin: 10px 0 18px; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
caption { text-align: left; caption-side: bottom; padding-top: 6px; max-width: 86ch; }
th, td { padding: 4px 12px 4px 0; text-align: right; white-space: nowrap; vertical-align: baseline; }
th { font-weight: 600; border-bottom: 1.5px solid var(--ink); white-space: normal; vertical-align: bottom; line-height: 1.3; }
td { border-bottom: 1px solid var(--line); }
th:first-child, td:first-child, .text { text-align: left; }
.wrap { white-space: normal; min-width: 22ch; }
tr.group td { font-size: 11.5px; text-transform: uppercase; letter-spacing: .06em; color: var(--soft);
  padding-top: 13px; border-bottom-color: #cbd5e1; }
tr.chance td { color: var(--soft); }
.ci { color: var(--soft); font-size: 12px; font-weight: 400; padding-left: 4px; }
.clear { font-weight: 650; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 3px 22px; font-size: 13.5px; margin: 10px 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
code, pre { font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { background: var(--tint); border: 1px solid var(--line); border-radius: 6px; padding: 12px 14px;
  white-space: pre-wrap; overflow-wrap: anywhere; }
figure { margin: 14px 0 22px; } figure img { max-width: 100%; height: auto; display: block; }
@media print { body { max-width: none; padding: 0; font-size: 11pt; } nav { display: none; }
  h2, h3, tr.group { break-after: avoid; } figure, tr { break-inside: avoid; } .scroll { overflow: visible; }
  table { font-size: 8pt; } .ci { font-size: 7.5pt; padding-left: 2px; } th, td { padding-right: 6px; } a { color: inherit; } }
"""

TEMPLATE = """
{%- macro cell(e) -%}
{%- if e.value is none -%}<td>–</td>
{%- else -%}<td>{{ e.value|num }}<span class="ci">[{{ e.low|num }}, {{ e.high|num }}]</span></td>{%- endif -%}
{%- endmacro -%}
{%- macro difference(e) -%}
<td{% if e.low is not none and (e.low > 0 or e.high < 0) %} class="clear"{% endif %}>{{ e.difference|signed }}
<span class="ci">[{{ e.low|signed }}, {{ e.high|signed }}]</span></td>
{%- endmacro -%}
{%- macro figure(name, alt, caption) -%}
{%- if name in figures -%}
<figure><img src="{{ figures[name] }}" alt="{{ alt }}"><figcaption>{{ caption }}</figcaption></figure>
{%- endif -%}
{%- endmacro -%}
{%- macro pairs(mapping) -%}
<dl>{% for key, value in mapping|flat %}<dt>{{ key }}</dt><dd>{{ value|words }}</dd>{% endfor %}</dl>
{%- endmacro -%}
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ run.title or "Run report" }}</title><style>{{ css|safe }}</style></head><body>
<header><h1>{{ run.title or "Run report" }}</h1>
{% set own = domains|own_names %}<p class="lead">{{ own|length }} domain{{ "s" if own|length != 1 }}{% if own %}:
{{ own|join(", ") }}{% endif %}{% if run.started %} · started {{ run.started }}{% endif %}
{%- if run.finished %} · finished {{ run.finished }}{% endif %}</p>
<nav><a href="#run">Run</a><a href="#results">Results</a><a href="#differences">Differences</a><a
 href="#slices">Slices</a><a href="#learning">Learning</a><a href="#privacy">Privacy</a><a
 href="#messages">Messages</a><a href="#timings">Timings</a><a href="#data">Data</a><a href="#config">Config</a></nav>
</header>
{% if problems %}<div class="warn"><p>Parts of the run folder could not be used:</p>
<ul>{% for problem in problems %}<li>{{ problem }}</li>{% endfor %}</ul></div>{% endif %}

<section id="run"><h2>What was run</h2>
{% if run %}
{% if run.command %}<pre>{{ run.command }}</pre>{% endif %}
<dl>
{% for name, value in [("Commit", run.commit), ("Seed", run.seed)] if value is not none and value is defined %}
<dt>{{ name }}</dt><dd>{{ value|words }}</dd>{% endfor %}
{% for name, value in [("Hardware", run.hardware), ("Versions", run.versions), ("LLM", run.llm)] if value %}
<dt>{{ name }}</dt><dd>{{ value|words }}</dd>{% endfor %}
</dl>
{% for note in run.notes or [] %}<p>{{ note }}</p>{% endfor %}
{% else %}<p class="note">run.json is missing: command, versions and hardware of this run are not known.</p>{% endif %}
<h3>Protocol</h3>
{% for sentence in protocol %}<p>{{ sentence }}</p>{% endfor %}
{% if run.protocol %}{{ pairs(run.protocol) }}{% endif %}
</section>

<section id="results"><h2>Results</h2>
{% if not domains %}<p class="note">No results were stored.</p>{% endif %}
{{ figure("hit", "Hit@1 of every method with 95 % intervals",
  "Hit@1 with 95 % intervals. An interval is about the method's own level; differences are tested pairwise below.") }}
{% for domain in domains %}
<h3>{{ domain.name }}</h3>
<div class="scroll"><table>
<thead><tr><th>Method</th><th>Hit@1</th><th>NDCG@10</th><th>MRR</th><th>Valid</th><th>Hit@1<br>if valid</th>
<th>NDCG@10,<br>catalogue</th><th>Users</th><th>Trained<br>params</th><th>Train<br>CPU s</th><th>Rank<br>CPU s</th></tr></thead>
<tbody>
<tr class="chance"><td>chance</td><td>{{ domain.chance["hit@1"]|num }}</td><td>{{ domain.chance["ndcg@10"]|num }}</td>
<td>{{ domain.chance["mrr"]|num }}</td><td></td><td></td><td></td><td></td><td></td><td></td><td></td></tr>
{% for row in domain.rows %}
{% if row.group and (loop.first or row.group != loop.previtem.group) %}
<tr class="group"><td colspan="11">{{ row.group }}</td></tr>
{% endif %}
<tr><td class="wrap">{{ row.label }}</td>{{ cell(row.metrics["hit@1"]) }}{{ cell(row.metrics["ndcg@10"]) }}
<td>{{ row.metrics["mrr"].value|num }}</td><td>{{ row.metrics["valid_ratio"].value|num }}</td>
<td>{{ row.metrics["hit@1|valid"].value|num }}</td>{{ cell(row.metrics["full_ndcg@10"]) }}
<td>{{ row.users|count }}</td><td>{{ row.trainable_params|count }}</td><td>{{ row.train_cpu_s|seconds }}</td>
<td>{{ row.cpu_s|seconds }}</td></tr>
{% endfor %}
</tbody>
<caption>Split: {{ domain.splits|join(", ") }}. {{ domain.num_candidates }} candidates per user, {{ domain.num_items|count }}
items in the catalogue. Brackets: 95 % intervals (Wilson for proportions, bootstrap over users for means). Ties:
{{ domain.ties|join(", ") }}. “Valid” is the share of answers that name exactly one candidate; an invalid answer is a
miss. “–”: not defined for the method (one that cannot score the catalogue, or whose cost was not recorded). Candidate
lists: {{ domain.candidate_hashes|join(", ") }}.</caption>
</table></div>
{% endfor %}</section>

<section id="differences"><h2>Paired differences</h2>
{% if comparisons %}
<div class="scroll"><table>
<thead><tr><th>a − b</th><th>Hit@1</th><th>only a<br>hits</th><th>only b<br>hits</th><th>p,<br>McNemar</th><th>p,<br>Holm</th>
<th>NDCG@10</th><th>Users</th></tr></thead>
<tbody>{% for c in comparisons %}
{% if loop.first or c.domain != loop.previtem.domain %}<tr class="group"><td colspan="8">{{ c.domain }}</td></tr>{% endif %}
<tr><td class="wrap">{{ c.label_a }} − {{ c.label_b }}</td>
{% if c.not_compared %}<td colspan="7" class="text wrap">not compared: {{ c.not_compared }}</td>
{% else %}{% set h = c["hit@1"] %}{{ difference(h) }}<td>{{ h.a_wins|count }}</td><td>{{ h.b_wins|count }}</td>
<td>{{ h.p_mcnemar|p }}</td><td>{{ c.p_holm|p }}</td>{{ difference(c["ndcg@10"]) }}
<td>{{ h.users|count }}{% if h.only_in_a or h.only_in_b %}
<span class="ci">({{ h.only_in_a }} + {{ h.only_in_b }} left out)</span>{% endif %}</td>{% endif %}</tr>
{% endfor %}</tbody>
<caption>Differences over the same users, with 95 % bootstrap intervals; bold where the interval leaves out zero.
McNemar's test is exact and two-sided; Holm's correction runs over all tests of this table. “Left out”: users that only
a or only b was evaluated on.</caption></table></div>
{% else %}<p class="note">No comparisons were asked for (run.json names none), or no results are there.</p>{% endif %}
</section>

<section id="slices"><h2>Slices</h2>
{% if not domains %}<p class="note">No results were stored.</p>{% endif %}
{% for domain in domains %}
<h3>{{ domain.name }}</h3>
<div class="scroll"><table>
{% set names = (domain.rows|first).slices.keys()|list %}
<thead><tr><th>Method</th>{% for name in names %}<th>Hit@1, {{ name }}</th><th>NDCG@10</th>{% endfor %}</tr></thead>
<tbody>{% for row in domain.rows %}
<tr><td class="wrap">{{ row.label }}</td>{% for name in names %}{% set s = row.slices[name] %}
{{ cell(s["hit@1"]) }}<td>{{ s["ndcg@10"].value|num }}</td>{% endfor %}</tr>
{% endfor %}</tbody>
<caption>{% for name in names %}{{ name }}: {{ (domain.rows|first).slices[name].users|count }} users{{ "; " if not
loop.last else "." }}{% endfor %} A target is cold with fewer than {{ cold }} training interactions; a history is short
with at most {{ short }} items.</caption></table></div>
{% endfor %}</section>

<section id="learning"><h2>Learning curves</h2>
{% if "curves" in figures %}
{{ figure("curves", "Validation metric and training losses per client over epochs", "Left: validation metrics, right:
training losses, one row a client. Shaded phases belong to federated rounds; the others are local.") }}
{% else %}<p class="note">No history was recorded (history.jsonl is missing or empty).</p>{% endif %}
</section>

<section id="privacy"><h2>Privacy of the uploaded item vectors</h2>
<p class="warn">The noise on item vectors is obfuscation, not differential privacy: no bound on what can be learned
follows from it. The attack figures below say how much it hides from somebody who holds the catalogue.</p>
{% if privacy %}
{{ figure("cosine", "Cosine between clean and sent vectors by noise level", "Cosine between an item's clean vector and
what was sent (mean and range over items), beside the value expected for Gaussian noise on unit vectors, and between the
clean vector and what the server returned.") }}
{{ figure("linkage", "Share of items linked by an attacker by noise level", "Linkage attack: share of uploaded vectors
that an attacker who holds the clean catalogue assigns to the right item.") }}
<div class="scroll"><table>
<thead><tr><th>σ</th><th>cosine,<br>mean</th><th>min</th><th>max</th><th>expected</th><th>obfuscation</th>
<th>linked,<br>nearest</th><th>linked,<br>one-to-one</th><th>chance</th></tr></thead>
<tbody>{% for domain, entries in privacy.items() %}<tr class="group"><td colspan="9">{{ domain }}</td></tr>
{% for e in entries %}
<tr><td>{{ e.sigma }}{{ " (this run)" if e.used }}</td><td>{{ e.cosine_mean|num }}</td>
<td>{{ e.cosine_min|num }}</td><td>{{ e.cosine_max|num }}</td><td>{{ e.expected_cosine|num }}</td>
<td>{{ e.obfuscation|num }}</td><td>{{ e.linkage_with_replacement|percent }}</td>
<td>{{ e.linkage_without_replacement|percent }}</td><td>{{ e.chance|percent }}</td></tr>
{% endfor %}{% endfor %}</tbody>
<caption>σ is the standard deviation of the noise on each coordinate of a unit vector; obfuscation is 1 − cosine.
Linked: share of items that the attacker assigns to the right entry of the catalogue.</caption></table></div>
{% if averaging.uploads %}
<h3>If the noise were drawn anew for each upload</h3>
<div class="scroll"><table>
<thead><tr><th>σ</th>{% for n in averaging.uploads %}<th>{{ n }} upload{{ "s" if n != 1 }}</th>{% endfor %}</tr></thead>
<tbody>{% for domain, rows in averaging.domains.items() %}
<tr class="group"><td colspan="{{ averaging.uploads|length + 1 }}">{{ domain }}</td></tr>
{% for sigma, linked in rows %}<tr><td>{{ sigma }}</td>
{% for share in linked %}<td>{{ share|percent }}</td>{% endfor %}</tr>
{% endfor %}{% endfor %}</tbody>
<caption>Share of items linked after averaging so many fresh uploads. The product draws the noise once per item and
sends the same vector again, so that its repeated uploads reveal nothing more than the first.</caption></table></div>
{% endif %}
{% else %}<p class="note">No privacy figures were computed (privacy.json is missing or empty).</p>{% endif %}
</section>

<section id="messages"><h2>What left each client</h2>
{% if communication.rows %}
<p>The ledger of the run holds {{ communication.messages|count }}
message{{ "s" if communication.messages != 1 }}: {{ communication.totals.up|bytes }} up to the server,
{{ communication.totals.down|bytes }} down.{% if communication.resent %} {{ communication.resent|count }} more were sent
again, word for word, when the run went on after an interruption; they are not counted twice.{% endif %} Who received what,
whether the ledger is whole, and what attacks reached: <a href="privacy_report.html">privacy report</a>, beside this file.</p>
<div class="scroll"><table>
<thead><tr><th>Client</th><th class="text">direction</th><th class="text">content</th><th>messages</th><th>bytes</th>
<th class="text">tensors</th><th class="text">protection</th></tr></thead>
<tbody>{% for row in communication.rows %}
<tr><td>{{ row.client }}</td><td class="text">{{ row.direction }}</td><td class="text">{{ row.kind }}</td>
<td>{{ row.messages|count }}</td><td>{{ row.bytes|bytes }}</td>
<td class="text wrap">{% for tensor in row.tensors[:4] %}<code>{{ tensor }}</code>{{ ", " if not loop.last }}{% endfor
%}{% if row.tensors|length > 4 %} and {{ row.tensors|length - 4 }} more{% endif %}</td>
<td class="text wrap">{{ row.mechanisms|join("; ") or ("none" if row.direction == "up" else "–") }}</td></tr>
{% endfor %}</tbody>
<caption>Shapes and types of every tensor stand in report.json.</caption></table></div>
{% elif not communication.unread %}<p class="note">No federated messages were recorded (ledger.jsonl is missing or
empty).</p>{% endif %}
{% if communication.unread %}<div class="warn"><p>{{ communication.unread|count }}
line{{ "s" if communication.unread != 1 }} of ledger.jsonl cannot be read: the ledger cannot be checked to its end, and more
may have left than is told here.</p></div>{% endif %}
</section>

<section id="timings"><h2>Timings</h2>
{% if "timings" in figures %}{{ figure("timings", "Wall-clock and CPU seconds of each stage", "Seconds of each stage,
wall clock and CPU (all threads).") }}
{% else %}<p class="note">No timings were recorded.</p>{% endif %}
</section>

<section id="data"><h2>Data</h2>
{% if cards %}
<div class="scroll"><table>
<thead><tr><th></th>{% for name in cards %}<th class="text">{{ name }}</th>{% endfor %}</tr></thead>
<tbody>{% for key, values in card_rows %}<tr><td>{{ key }}</td>{% for value in values %}
<td class="text wrap">{{ value|words }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
{% else %}<p class="note">No data cards were stored.</p>{% endif %}
</section>

<section id="config"><h2>Configuration</h2>
{% if config %}<pre>{{ config }}</pre>{% else %}<p class="note">config.yaml is missing.</p>{% endif %}
</section>
</body></html>
"""
