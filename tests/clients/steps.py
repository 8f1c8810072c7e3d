"What each client does, step by step; it prints the name of a step when the step has held"
import sys

STEPS = ("load", "candles", "leverage", "market", "limit", "partial fill", "cancel", "conditional", "reduce-only",
         "user events", "errors")
EVENTS = {"TRADE_LITE", "ACCOUNT_UPDATE", "ORDER_TRADE_UPDATE", "ALGO_UPDATE", "ACCOUNT_CONFIG_UPDATE"}
CODES = (-1121, -2011, -2019, -2022, -4164)                      # asked for by mistakes, in this order
MOST = 900.                                                      # BTC; nobody's margin is enough for it


def venue()->tuple[str, str, str]:
    "URL, key and secret, as the script was told"
    url, key, secret = sys.argv[1:4]
    return url, key, secret


def held(step:str, condition:object=True)->None:
    "Say that a step has held; it is an error if it has not"
    if not condition: raise SystemExit(f"{step}: {condition!r}")
    print(step, flush=True)


def check(condition:object, *facts:object)->None:
    "A fact within a step"
    if not condition: raise SystemExit(f"not so: {facts}")


def code_of(refused:list[str])->None:
    "Each mistake is answered with its code, which stands in the message that the client shows"
    for code, sentence in zip(CODES, refused, strict=True): check(str(code) in sentence, code, sentence)
