"""Studies: several recipes trained, evaluated and timed alike, and one report. `hinny.study(...)` is `conduct.study`.

    config   what a study is          execute  runs its processes      claims, rules  the paper's claims, decided
    plan     its command lines        progress shows them              figures, draw  plots
    conduct  the verb                 collect  runs → rows of figures  summary, report  rows → HTML and Markdown
"""

from hinny.verb import make_callable

make_callable(__name__, "hinny.study.conduct:study")
