"""The HTML of the privacy report as a Jinja template: one file, no scripts, nothing fetched, fit for print."""

TEMPLATE = """
{%- macro cell(e) -%}
{%- if e is none or e.value is none -%}<td>–</td>
{%- else -%}<td>{{ e.value|num }}<span class="ci">[{{ e.low|num }}, {{ e.high|num }}]</span></td>{%- endif -%}
{%- endmacro -%}
{%- macro share(e) -%}
<td>{{ e.value|percent }}<span class="ci">[{{ e.low|percent }}, {{ e.high|percent }}]</span></td>
{%- endmacro -%}
{%- macro figure(name, alt, caption) -%}
{%- if name in figures -%}
<figure><img src="{{ figures[name] }}" alt="{{ alt }}"><figcaption>{{ caption }}</figcaption></figure>
{%- endif -%}
{%- endmacro -%}
{%- macro standing(word) -%}
{{ {"guarantee": "guarantee", "simulated": "simulated", "hidden": "hidden from the server",
"heuristic": "heuristic", "none": "no protection",
"unproven": "stated, no guarantee"}[word] }}
{%- endmacro -%}
{%- macro result(holds) -%}
{{ "not checked" if holds is none else "holds" if holds else "FAILS" }}
{%- endmacro -%}
{%- macro short(value) -%}{{ value|up(3) if value is number else "–" }}{%- endmacro -%}
{%- macro eps(value) -%}{{ value|up(3) if value is number else "∞ (none)" }}{%- endmacro -%}
{%- macro star(row, value) -%}{{ "*" if row.simulated and value is number }}{%- endmacro -%}
{%- macro bound(row, value) -%}{{ short(value) }}{{ star(row, value) }}{%- endmacro -%}
{%- macro starred(rows) -%}
{%- if rows|selectattr("simulated")|selectattr("epsilon", "number")|list %} “*”: in a simulation alone. The noise follows
from the run's seed, and nothing bounds what somebody who knows the seed can find.{% endif -%}
{%- endmacro -%}
{%- macro rounds(numbers) -%}
{{ numbers|join(", ") if numbers|length <= 6 else numbers|first ~ " to " ~ numbers|last }}
{%- endmacro -%}
{%- macro metric(branch, name) -%}<td>{{ ((branch or {})[name] or {}).value|num }}</td>{%- endmacro -%}
{%- macro whose(row) -%}{{ "aggregated teacher" if row.client == "" else "own update" }}{%- endmacro -%}
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Privacy report{% if run.title %}: {{ run.title }}{% endif %}</title><style>{{ css|safe }}</style></head><body>
<header><h1>Privacy report{% if run.title %}: {{ run.title }}{% endif %}</h1>
<p class="lead">What left each organisation in this run, how it was protected, and what attackers could make of it.
{%- if run.started %} Run started {{ run.started }}.{% endif %}</p>
<nav><a href="#words">In plain words</a><a href="#check">Self-check</a><a href="#left">What left</a><a
 href="#mechanisms">Mechanisms</a><a href="#persons">Attacks on persons</a><a href="#items">Attacks on items</a><a
 href="#curve">Curves</a><a href="#method">Method</a></nav></header>
{% if problems %}<div class="warn"><p>Parts of the run folder could not be used:</p>
<ul>{% for problem in problems %}<li>{{ problem }}</li>{% endfor %}</ul></div>{% endif %}
{% if check.holds is none %}<div class="warn"><p><strong>The self-check could not be finished.</strong></p>
<ul>{% for reason in check.unchecked %}<li>{{ reason }}</li>{% endfor %}</ul></div>
{% elif not check.holds %}<div class="warn"><p><strong>The self-check found contradictions. Do not rely on this
report.</strong></p><ul>{% for problem in check.problems %}<li>{{ problem }}</li>{% endfor %}</ul></div>{% endif %}

<section id="words"><h2>In plain words</h2>
{% for question, sentences in answers %}<h3>{{ question }}</h3>
{% for sentence in sentences %}<p>{{ sentence }}</p>{% endfor %}{% endfor %}
</section>

<section id="check"><h2>Self-check against the ledger</h2>
<div class="scroll"><table>
<thead><tr><th>Check</th><th class="text">result</th><th class="text">detail</th></tr></thead>
<tbody>{% for row in check.rows %}<tr><td class="wrap">{{ row.what }}</td>
<td class="text{{ " clear" if row.holds == false }}">{{ result(row.holds) }}</td>
<td class="text wrap">{{ row.detail }}</td></tr>{% endfor %}</tbody>
<caption>The counts of this report come from groups of messages, those of the ledger from its lines one by one.
sha256 of the
last line: <code>{{ ledger.head }}</code>. Note it where nobody who can write the run folder can change it.</caption>
</table></div>
</section>

<section id="left"><h2>What left, how often, in which shape</h2>
{% if communication.rows %}
<p>{{ communication.messages|count }} message{{ "s" if communication.messages != 1 }}:
{{ communication.totals.up|bytes }} up
to the server, {{ communication.totals.down|bytes }} down.
{% if communication.resent %} {{ communication.resent|count }} more
were sent again, word for word, after an interruption.{% endif %}</p>
<div class="scroll"><table>
<thead><tr><th>Client</th><th class="text">direction</th><th class="text">content</th><th>messages</th>
<th class="text">rounds</th><th>bytes</th><th class="text">tensors</th></tr></thead>
<tbody>{% for row in communication.rows %}
<tr><td>{{ row.client }}</td><td class="text">{{ row.direction }}</td><td class="text">{{ row.kind }}</td>
<td>{{ row.messages|count }}</td><td class="text">{{ rounds(row.rounds) }}</td>
<td>{{ row.bytes|count }}</td>
<td class="text wrap">{% for tensor in row.tensors[:4] %}<code>{{ tensor }}</code>{{ ", " if not loop.last }}{% endfor
%}{% if row.tensors|length > 4 %} and {{ row.tensors|length - 4 }} more{% endif %}</td></tr>
{% endfor %}</tbody>
<caption>Round 0 is the exchange of item vectors before the first round. Every tensor with its shape stands in
privacy_report.json, every message with its hash in ledger.jsonl.</caption></table></div>
{% elif not communication.unread %}<p class="note">Nothing: the ledger holds no message.</p>{% endif %}
{% if communication.unread %}<p class="note">{{ communication.unread|count }}
line{{ "s" if communication.unread != 1 }} of the ledger cannot be read: more may
have left than is told here.</p>{% endif %}
</section>

<section id="mechanisms"><h2>Mechanisms and what they promise</h2>
{% if mechanisms %}
<div class="scroll"><table>
<thead><tr><th>Client</th><th class="text">content</th><th class="text">standing</th><th class="text">mechanism</th>
<th>ε</th><th>δ</th><th class="text">neighbours differ by</th><th class="text">holds</th>
<th class="text">parameters</th></tr></thead>
<tbody>{% for m in mechanisms %}
<tr><td>{{ m.client }}</td><td class="text">{{ m.kind }}</td><td class="text clear">{{ standing(m.standing) }}</td>
<td class="text wrap">{{ m.mechanism }}</td>
<td>{% if m.standing in ("guarantee", "simulated") %}{{ m.epsilon|up(3) }}{% else %}–{% endif %}</td>
<td>{% if m.standing in ("guarantee", "simulated") %}{{ m.delta|up(2) }}{% else %}–{% endif %}</td>
<td class="text wrap">{{ m.neighbours or "–" }}</td>
<td class="text wrap">{% if m.standing in ("guarantee", "simulated") %}{{ against(m) }}{% else %}–{% endif %}</td>
<td class="text wrap">{{ m.parameters|words }}</td></tr>
{% endfor %}</tbody>
<caption>A guarantee bounds what the attackers under “holds” can learn of the client's own users or products. A heuristic hides
something from the attackers that were tried and
promises nothing about others. Simulated: the noise follows from the run's seed, so that whoever knows the seed can take
it off; ε and δ say what the same run would promise with secrets of the clients' own. ε and δ are those of
the last message and cover all before it; none are shown where they
are not known to cover every message of the client.</caption></table></div>
{% elif communication.unread %}<p class="note">Not known: the ledger cannot be read.</p>
{% else %}<p class="note">No client sent anything.</p>{% endif %}
</section>

<section id="persons"><h2>Attacks on persons: membership inference</h2>
{% if members %}
<div class="scroll"><table>
<thead><tr><th>Domain</th><th class="text">attacked</th><th class="text">score</th><th>round</th><th>area under ROC</th>
<th>chance</th><th>limit</th><th>TPR at 1 % FPR</th><th>chance</th><th>limit</th><th>ε</th>
<th>members<br>+ others</th></tr></thead>
<tbody>{% for row in members %}
<tr><td>{{ row.domain }}</td><td class="text">{{ whose(row) }}</td><td class="text">{{ scores[row.score] }}</td>
<td>{{ row.round }}</td>{{ cell(row.auc) }}<td>{{ row.chance.auc|num }}</td><td>{{ bound(row, (row.limit or {}).auc) }}</td>
{{ cell(row.tpr) }}<td>{{ row.chance.tpr|num }}</td><td>{{ bound(row, (row.limit or {}).tpr) }}</td>
<td>{{ bound(row, row.epsilon) }}</td><td>{{ row.members|count }} + {{ row.others|count }}</td></tr>
{% endfor %}</tbody>
<caption>The last message of each kind. The attacker holds the weights, the catalogue and the training sequences of
users, half
of whom trained. “Limit”: the most that the stated ε and δ allow any attacker on average; “–” where they do not cover
every message until then.{{ starred(members) }} Brackets: 95 % intervals, each attack for
itself; in plain words the best of several has a wider one. Non-members
are users held out of training; none of the sequences contains a validation or test item.</caption></table></div>
{{ figure("rounds", "Area under the ROC curve of membership inference by round", "Membership inference by loss after each round,
with 95 % intervals.") }}
{% else %}<p class="note">Not measured.</p>{% endif %}
</section>

<section id="items"><h2>Attacks on items</h2>
{% if attacks.linkage %}
<h3>Linkage: which product is this vector?</h3>
<div class="scroll"><table>
<thead><tr><th>Client</th><th>σ</th><th>cosine,<br>mean</th><th>uploads</th><th>nearest</th><th>one-to-one</th>
<th>after averaging</th><th>chance</th><th>chance,<br>one-to-one</th><th>items<br>tried</th></tr></thead>
<tbody>{% for row in attacks.linkage %}<tr><td>{{ row.client }}</td><td>{{ row.sigma }}</td>
<td>{{ row.cosine_mean|num }}</td>
<td>{{ row.uploads }}</td>{{ share(row.with_replacement) }}{{ share(row.without_replacement) }}{{ share(row.after_averaging) }}
<td>{{ row.chance|percent }}</td><td>{{ row.chance_without_replacement|percent }}</td>
<td>{{ row.attacked|count }}</td></tr>
{% endfor %}</tbody><caption>Share of recorded vectors traced to their product by somebody who holds the texts of all
products.
“After averaging”: over all uploads of the client, whose noise is drawn once and therefore does not cancel.</caption>
</table></div>
{% endif %}
{% if attacks.answers %}
<h3>Linkage of answers: which product of another client is in what came back?</h3>
<div class="scroll"><table>
<thead><tr><th>Client</th><th>round</th><th>cosine,<br>mean</th><th>near copies</th><th>named</th>
<th>without<br>the answer</th><th>chance</th><th>products<br>named</th>
<th>of the<br>others'</th><th>answers<br>tried</th></tr></thead>
<tbody>{% for row in attacks.answers %}<tr><td>{{ row.client }}</td><td>{{ row.round }}</td>
<td>{{ row.cosine_mean|num }}</td>{{ share(row.copies) }}{{ share(row.with_replacement) }}{{ share(row.without_answer) }}
<td>{{ row.chance|percent }}</td><td>{{ row.products_named|count }}</td><td>{{ row.foreign|count }}</td>
<td>{{ row.attacked|count }}</td></tr>
{% endfor %}</tbody><caption>The client that receives mixed vectors attacks, holding the texts of all products of the
others. “Named”: share of answers whose nearest product is the one whose upload weighs most in it. “Cosine”, “near
copies” (from .95 on): between an answer and that upload. “Without the answer”: named by the client's own upload alone.
Clients that choose their uploads to find out more were not tried.</caption></table></div>
{% endif %}
{% if attacks.attribute %}
<h3>Attribute inference: what kind of product is it?</h3>
<div class="scroll"><table>
<thead><tr><th>Client</th><th class="text">attribute</th><th>σ</th><th>classes</th><th>right answers</th>
<th>chance<br>(majority)</th>
<th>items</th></tr></thead>
<tbody>{% for row in attacks.attribute %}<tr><td>{{ row.client }}</td><td class="text">{{ row.attribute }}</td>
<td>{{ row.sigma }}</td>
<td>{{ row.classes }}</td>{{ share(row.accuracy) }}<td>{{ row.chance|percent }}</td>
<td>{{ row.accuracy.n|count }}</td></tr>
{% endfor %}</tbody><caption>A linear classifier that has learned from other products. Popularity is counted on training
interactions, so that it says something about behaviour.</caption></table></div>
{% endif %}
{% if attacks["items"] %}
<h3>Item inference: which products was the client trained on?</h3>
<div class="scroll"><table>
<thead><tr><th>Domain</th><th class="text">attacked</th><th>round</th><th class="text">score</th>
<th>area under ROC</th><th>chance</th>
<th>random updates</th><th>ε</th><th>trained<br>+ others</th></tr></thead>
<tbody>{% for row in attacks["items"] %}<tr><td>{{ row.domain }}</td><td class="text">{{ whose(row) }}</td>
<td>{{ row.round }}</td>
<td class="text">{{ row.score }}</td>{{ cell(row.auc) }}<td>{{ row.chance|num }}</td>
<td>{% if row.random_updates %}{{ row.random_updates|first|num }} to
{{ row.random_updates|last|num }}{% else %}–{% endif %}</td>
<td>{{ bound(row, row.epsilon) }}</td>
<td>{{ row.trained|count }} + {{ row.untrained|count }}</td></tr>
{% endfor %}</tbody><caption>From the difference of two messages: does an item's score tell whether it stood in a
training
sequence? “Random updates”: areas that the same score reaches on updates of the same size and of random direction.
Similar
products move together, so those can lie further from .5 than the interval over items.
{{ starred(attacks["items"]) }}</caption></table></div>
{% endif %}
{% if not (attacks.linkage or attacks.answers or attacks.attribute or attacks["items"]) %}
<p class="note">Not measured on recorded messages.</p>{% endif %}
{{ figure("linkage", "Share of items linked by an attacker by noise level", "Linkage simulated at other noise levels.") }}
{{ figure("cosine", "Cosine between clean and sent vectors by noise level", "How much of a vector survives the noise.") }}
{% if attacks.not_run %}<div class="warn"><p>Not attacked, and therefore not known:</p>
<ul>{% for sentence in attacks.not_run %}<li>{{ sentence }}</li>{% endfor %}</ul></div>{% endif %}
</section>

<section id="curve"><h2>Privacy beside utility, over runs</h2>
{% if curve %}
{{ figure("epsilon", "Membership inference and utility against epsilon", "Membership inference on the last shared teacher, and
ranking quality on test users, of runs that differ in ε. With 95 % intervals.") }}
<div class="scroll"><table>
<thead><tr><th>Domain</th><th>ε</th><th>σ</th><th>area, by loss</th><th>area, shadow models</th>
<th>TPR at 1 % FPR,<br>by loss</th>
{% for branch in branches %}<th>{{ branch }} Hit@1</th><th>{{ branch }} NDCG@10</th>{% endfor %}</tr></thead>
<tbody>{% for p in curve %}<tr><td>{{ p.domain }}</td><td>{{ eps(p.epsilon) }}{{ star(p, p.epsilon) }}</td>
<td>{{ p.sigma if p.sigma is number else "–" }}</td>
{{ cell((p.membership.loss or {}).auc or none) }}{{ cell((p.membership.calibrated or {}).auc or none) }}
{{ cell((p.membership.loss or {}).tpr or none) }}
{% for branch in branches %}{{ metric(p.utility[branch], "hit@1") }}{{ metric(p.utility[branch], "ndcg@10") }}{% endfor %}</tr>
{% endfor %}</tbody><caption>“–”: the run holds no such figure.{{ starred(curve) }}</caption></table></div>
{% else %}<p class="note">A curve needs several audited runs: <code>lightning-sfubm audit --run_dir RUN --beside
OTHER_RUN</code>
draws them into this report.</p>{% endif %}
</section>

<section id="method"><h2>How this was made</h2>
{% if audit %}<dl><dt>Audit</dt><dd>{{ audit.command or "–" }}</dd><dt>at</dt><dd>{{ audit.started or "–" }}</dd>
<dt>Settings</dt><dd>{{ audit.settings|words }}</dd></dl>
{% else %}<p class="note">No audit was made: run <code>lightning-sfubm audit</code> on a run that keeps its
messages.</p>{% endif %}
<p>Membership inference by loss: Yeom et al. 2018; against shadow models: difficulty calibration of Watson et al.
2022, the
offline attack of Carlini et al. 2022 with a common variance. Interval of an area: Newcombe 2006, method 5; of a rate
at fixed false
positives: bootstrap over both groups; of a share: Wilson. Limit under differential privacy: Kairouz et al. 2015.</p>
</section>
</body></html>
"""
