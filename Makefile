# `make demo` shows the main job on a real model; `make test` runs everything that CI runs. The rest are parts of these.
SHELL := /bin/bash
.DEFAULT_GOAL := help
CACHE := $(CURDIR)/.cache
export PROTOC ?= $(CACHE)/bin/protoc
export PYTHONPATH := $(CACHE)/python
export PATH := $(CACHE)/bin:$(PATH)
# With a CUDA toolkit the binary holds the kernels for GPUs; `make cuda` brings one.
ifeq ($(CUDA_HOME),)
export CUDA_HOME = $(patsubst %/bin/nvcc,%,$(wildcard $(CACHE)/cuda/nvidia/cu13/bin/nvcc))
endif

# make demo TP=1 REPLICAS=2 MODEL=path/to/model PROMPT="…"
TP ?= 3
REPLICAS ?= 1
MODEL ?= $(CACHE)/models/SmolLM2-135M-Instruct.Q4_1.gguf
PROMPT ?= What is the mistral wind? Answer in two sentences.
HTTP ?= 127.0.0.1:8000
GRPC ?= 127.0.0.1:8001

# make bench BENCH="--models smollm2 --peers llama.cpp,openvino --rounds 3"
BENCH ?=

# make soak SEEDS=1000000
SEEDS ?= 100000

# make chaos CHAOS="--kills 20 --streams 50"
CHAOS ?=

# What `make chaos` writes.
STORY = benches/results/chaos-$(shell date +%F).md

# make leaks LEAKS="--clients 2000 --seed 7"
LEAKS ?=

# make fuzz FUZZ_SECONDS=3600 FUZZ_TARGET=templates
FUZZ_SECONDS ?= 600
FUZZ_TARGET ?=

# make mutants MUTANTS="--shard 0/8"
MUTANTS ?=
MUTATE = mkdir -p target/mutants && CARGO_INCREMENTAL=1 CARGO_TARGET_DIR=$(CURDIR)/target/mutants/build GALERNE_SEEDS=100 cargo mutants --shuffle --timeout 60 $(MUTANTS) -C=--locked -o target/mutants
HOST = $(shell rustc -vV | sed -n 's/^host: //p')

.PHONY: help demo test build all dist cuda lint unit arm test-e2e proto crds chart image bench chaos faults leaks soak gpu-suite fuzz mutants clean
help: ## show this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 11

demo: ## serve the demo model from 3 rank processes, a router and a real etcd; stream one answer
	@.ci/setup demo
	@$(MAKE) --no-print-directory build
	@.ci/demo --model "$(MODEL)" --tp "$(TP)" --replicas "$(REPLICAS)" --http "$(HTTP)" --grpc "$(GRPC)" --prompt "$(PROMPT)"

test: ## everything that CI runs
	@.ci/setup test
	@$(MAKE) --no-print-directory lint proto all unit $(if $(filter x86_64,$(shell uname -m)),arm) faults

build: ## the release binary, target/release/galerne
	@.ci/setup build
	cargo build --release --locked --bin galerne

# What tests add to dependencies' features would have most of them compiled twice, if the binary were built by itself first.
all: ## the release binary, tests and examples at once, as `make test` has them
	cargo build --release --workspace --all-targets --locked

dist: ## the binary to ship, target/dist/galerne: optimized as a whole, which takes some minutes more
	@.ci/setup build
	cargo build --profile dist --locked --bin galerne

cuda: ## the release binary with kernels for NVIDIA GPUs; fetches a CUDA compiler if there is none
	@.ci/setup cuda
	@$(MAKE) --no-print-directory build

lint: ## format, clippy with warnings denied, dependency rules
	cargo fmt --all --check
	cargo clippy --release --workspace --all-targets --locked -- -D warnings
	cargo deny --locked --workspace check --hide-inclusion-graph bans licenses sources

proto: ## lint of the gRPC descriptions, and no breaking change since the released baseline
	buf lint proto
	buf breaking proto --against proto/baseline.binpb

unit: ## unit, integration and process-level tests (needs `make all` or `make build` first)
	cargo test --release --workspace --locked

arm: ## the tests of the CPU kernels on 64-bit ARM, on an emulated CPU
	@.ci/setup arm
	env -u CUDA_HOME RUSTC=/usr/bin/rustc CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc \
	CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER=qemu-aarch64 \
	cargo test --release --locked --target aarch64-unknown-linux-gnu --target-dir target/arm -p galerne-model --lib

crds: build ## the resource definitions, k8s/crds and the chart's, from the types
	@mkdir -p k8s/crds helm/galerne/crds
	target/release/galerne operator crd >k8s/crds/galerneclusters.yaml
	cp k8s/crds/*.yaml helm/galerne/crds/

chart: ## what the chart copies and what is copied from it: the dashboard, k8s/operator.yaml
	cp k8s/grafana/galerne.json helm/galerne/files/
	$(CACHE)/bin/helm template galerne helm/galerne --namespace galerne-system | grep -vE '^ *(helm.sh/chart|app.kubernetes.io/managed-by): ' >k8s/operator.yaml

image: ## the container image, galerne:latest (needs docker)
	docker build -t galerne .

chaos: build ## kill, stop, cut off and molest every part of a cluster while streams run; count what was lost (CHAOS="--quick")
	python3 benches/chaos/run.py $(CHAOS)
	$(if $(CHAOS),,python3 benches/chaos/takeover.py --table $(STORY))
	$(if $(CHAOS),,python3 benches/chaos/stages.py --table $(STORY))
	$(if $(CHAOS),,python3 benches/chaos/partitions.py --table $(STORY))
	$(if $(CHAOS),,python3 benches/chaos/hostile.py --table $(STORY))

faults: ## a cut of chaos and leaks (needs `make all` or `make build` first)
	python3 benches/chaos/run.py --quick
	python3 benches/chaos/stages.py --quick
	cd benches/chaos && python3 -c "import hostile, partitions, takeover" && python3 leaks.py --clients 6000

leaks: build ## 10,000 clients that hang up at random moments: nothing may stay behind
	cd benches/chaos && python3 leaks.py $(LEAKS)

test-e2e: build ## the operator with real processes: scale, kill, cordon, roll out under load, and lose no stream
	cargo test --release --locked -p galerne-operator --test kube live -- --nocapture

soak: ## many more seeds of the simulations of groups, streams and clusters that fail (SEEDS=100000)
	GALERNE_SEEDS=$(SEEDS) cargo test --release --locked -p galerne-coord --lib simulation
	GALERNE_SEEDS=$(SEEDS) cargo test --release --locked -p galerne-worker --lib simulation
	GALERNE_SEEDS=$(SEEDS) cargo test --release --locked -p galerne-operator --lib plan

bench: build ## all-reduce latency; what starting costs; the engine beside its peers, which are installed once (BENCH="--peers llama.cpp")
	cargo run --release -p galerne-collective --example latency
	python3 benches/load/start.py target/release/galerne "$(MODEL)"
	cargo build --release --locked -p galerne-model --example speed --example bounds
	python3 benches/peers/run.py $(BENCH)

gpu-suite: ## one folder, target/gpu-suite, for a machine with a GPU: `python3 run.py` there checks and measures the kernels
	@.ci/setup suite
	cargo build --release --locked -p galerne-model --example gpu
	python3 benches/gpu/pack.py target/release/examples/gpu target/gpu-suite

fuzz: ## hostile bytes at every surface, or at FUZZ_TARGET, for FUZZ_SECONDS each, guided by coverage
	@.ci/setup build
	FUZZ_SECONDS="$(FUZZ_SECONDS)" RUSTFLAGS="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=3 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters" \
		cargo test --release --workspace --locked --no-fail-fast --target $(HOST) --target-dir target/fuzz --test fuzz -- $(FUZZ_TARGET) --nocapture --test-threads=1

# A mutant costs a build of its crate and a run of its tests, so both are cheap: no optimization, few seeds.
mutants: ## change the code that fences, replays and deduplicates (.cargo/mutants.toml): do tests notice? (needs cargo-mutants)
	$(MUTATE)/types -p galerne-types --test-package galerne-types -- --lib
	$(MUTATE)/coord -p galerne-coord --test-package galerne-coord -- --lib --test conformance -- --skip a_real_etcd_conforms --skip secured
	$(MUTATE)/streams -p galerne-worker -p galerne-router --test-package galerne-worker,galerne-router -- --lib --test faces

clean: ## build outputs; keeps what was fetched
	cargo clean
