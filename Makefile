# Everything a developer or CI does. `make` alone lists it.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS += --no-print-directory

CARGO_TARGET_DIR ?= $(CURDIR)/target
export CARGO_TARGET_DIR
TOOLS := $(CARGO_TARGET_DIR)/tools
VENV := $(CARGO_TARGET_DIR)/venv
# What the tests need besides Rust; TBOT_TEST_VENV tells them where it is.
export TBOT_TEST_VENV := $(VENV)
DENY_VERSION := 0.20.2

.PHONY: help build test lint ci bench fuzz docs fmt setup deny advisories

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## Release binary at target/release/tbot
	cargo build --release --locked

test: setup ## All tests; sets up by itself what they need
	cargo test --locked --no-fail-fast

lint: ## Formatting, clippy and cargo-deny, warnings denied
	cargo fmt --check
	cargo clippy --locked --all-targets -- -D warnings
	@$(MAKE) deny

# For those who work on it, so private items are documented too and may be linked to.
docs: ## API documentation, broken links denied
	RUSTDOCFLAGS="-D warnings -A rustdoc::private_intra_doc_links" cargo doc --locked --no-deps --document-private-items

bench: ## Measurements of this machine (docs/performance.md)
	cargo bench --locked

# Each target runs for a second in `make test`. For coverage-guided runs of one target: cargo bolero test.
fuzz: ## Parsers of outside bytes against random input, FUZZ_SECONDS (60) for each
	BOLERO_RANDOM_TEST_TIME_MS=$${FUZZ_SECONDS:-60}000 cargo test --locked --lib --test it -- fuzz_

fmt: ## Formats the code
	cargo fmt

# Each stage says how long it took.
define stage
	@start=$$(date +%s); $(MAKE) $(1); echo "== make $(1): $$(( $$(date +%s) - start )) s"
endef

ci: ## What CI runs: lint, docs, test
	$(call stage,lint)
	$(call stage,docs)
	$(call stage,test)

setup: ## What the tests need besides Rust: a Python venv under target/, system packages
	@tests/support/setup.sh "$(VENV)"

# The tool is built without optimisation: it runs for seconds, an optimised build takes minutes.
deny: ## Licences, sources and banned crates
	@if ! cargo deny --version > /dev/null 2>&1 && ! [ -x "$(TOOLS)/bin/cargo-deny" ]; then \
		echo "installing cargo-deny $(DENY_VERSION) into $(TOOLS)"; \
		CARGO_TARGET_DIR="$(TOOLS)/build" cargo install cargo-deny --version $(DENY_VERSION) --locked --debug --quiet --root "$(TOOLS)"; \
		rm -rf "$(TOOLS)/build"; \
	fi
	PATH="$(TOOLS)/bin:$$PATH" cargo deny --locked check --hide-inclusion-graph bans licenses sources

advisories: ## Known vulnerabilities; fetches the advisory database
	PATH="$(TOOLS)/bin:$$PATH" cargo deny check advisories
