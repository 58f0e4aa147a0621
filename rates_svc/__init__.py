"""Exchange rates: what one currency was worth in another, by whom and when.

`GetExchangeRate` answers the rate of a pair, `ConvertMoney` applies one and says how it
rounded, `ListCurrencies` says what can be converted. Rates come from the history of the
European Central Bank that stands in memory (`providers`), so the service has no
database, sends and receives no events, and any number of replicas answer alike; see
docs/adr/0020-rates-come-from-a-shipped-history.md.
"""
