"""The tests: unit, suites, integration, component, contract, e2e and chaos."""
