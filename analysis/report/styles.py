"""Colours and dashes of lines and bars, the same on the page and in the pictures.

The colour-blind can tell the colours apart, and so can a grey print by the dashes.
"""

_LIGHT_SERIES = ("#0b6bb5", "#cc4e08", "#00805c", "#a93d88", "#9a6a00", "#3f4854")
_DARK_SERIES = ("#5cb3f5", "#ff8f50", "#35c99a", "#e58fc9", "#e0b03e", "#bcc5d0")
_LIGHT_DOMAINS = (
    *("#332288", "#66bbdd", "#339988", "#117733", "#999933"),
    *("#d8c35f", "#cc6677", "#882255", "#aa4499", "#8a929e"),
)
_DARK_DOMAINS = (
    *("#8f86e8", "#8fd3f0", "#55bfae", "#3fa863", "#b9b84d"),
    *("#e6d67e", "#e88a98", "#c0578c", "#cf76c2", "#a7b0bc"),
)
# Lengths of dashes and gaps in widths of the line; none is a line without gaps.
_DASHES = ((), (4, 1.5), (1, 1.5), (5, 1.5, 1, 1.5), (8, 2), (3, 1, 0.5, 1))

# Series beyond these look like others again; the page has the classes `s0`, … for them, and `d0`, … for domains.
NUM_STYLES = 2 * len(_LIGHT_SERIES)
NUM_DOMAIN_STYLES = len(_LIGHT_DOMAINS)

_LINE_WIDTH = 1.8  # on the page


def series_color(number: int) -> str:
    """Return the colour of series `number` on white."""
    return _LIGHT_SERIES[_color_number(number)]


def series_dashes(number: int) -> tuple[float, ...]:
    """Return the lengths of the dashes and gaps of series `number` in widths of the line."""
    return _DASHES[number % len(_DASHES)]


def domain_color(number: int) -> str:
    """Return the colour of domain `number` on white."""
    return _LIGHT_DOMAINS[number % NUM_DOMAIN_STYLES]


def style_rules() -> str:
    """Return the rules of a style sheet for all series and domains, in both themes."""
    rules = [
        f":root {{ {_variables(_LIGHT_SERIES, _LIGHT_DOMAINS)} }}",
        f"@media (prefers-color-scheme: dark) {{ :root {{ {_variables(_DARK_SERIES, _DARK_DOMAINS)} }} }}",
        f".series path {{ stroke-width: {_LINE_WIDTH}; }}",
    ]
    for number in range(NUM_STYLES):
        rules.append(f".s{number} {{ color: var(--s{_color_number(number)}); }}")
        if dashes := series_dashes(number):
            lengths = " ".join(f"{length * _LINE_WIDTH:g}" for length in dashes)
            rules.append(f".series.s{number} path {{ stroke-dasharray: {lengths}; }}")
    rules += [f".d{number} {{ color: var(--d{number}); }}" for number in range(NUM_DOMAIN_STYLES)]
    return "\n".join(rules) + "\n"


def _color_number(number: int) -> int:
    # The second round of colours is shifted, so that none has the dashes that it had in the first.
    rounds, place = divmod(number % NUM_STYLES, len(_LIGHT_SERIES))
    return (place + rounds * len(_LIGHT_SERIES) // 2) % len(_LIGHT_SERIES)


def _variables(series: tuple[str, ...], domains: tuple[str, ...]) -> str:
    named = [f"--s{number}: {color};" for number, color in enumerate(series)]
    return " ".join([*named, *(f"--d{number}: {color};" for number, color in enumerate(domains))])
