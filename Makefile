# SPDX-License-Identifier: MIT
# Everything here starts from nothing: git, make, python3 >= 3.11 and Debian's apt are enough. What is missing is installed,
# into .venv by pip and, as root, by apt; nothing is installed twice. What the guests need, tests/guest installs.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
VERSION := $(shell sed -n '1s/.*(\(.*\)).*/\1/p' debian/changelog)
START := $(shell date +%s)
DEB := dist/nbdd_$(VERSION)_all.deb
WHEEL := dist/nbdd-$(VERSION)-py3-none-any.whl
# What is built carries the time of its changelog and no other, so that the same sources give the same octets.
export SOURCE_DATE_EPOCH := $(shell date --date="$$(sed -n 's/^ -- .*>  //p;T;q' debian/changelog)" +%s)

DEB_PACKAGES := dpkg-dev debhelper dh-python pybuild-plugin-pyproject python3-all python3-hatchling
CHECK_TESTS := tests/unit tests/interop
# Groups, in the order of tests/conftest.py, for whichever process is free.
# Processes, each with a guest.
WORKERS ?= 2
# By another name, or `make -n` would run the whole line that holds it.
BESIDE := $(MAKE)
GROUPS := --dist loadgroup --no-loadscope-reorder
# What the package is made from; the build sees nothing else of the tree.
DEB_SOURCES := pyproject.toml README.md LICENSE CHANGELOG.md nbdd config dbus desktop systemd completions man debian $(shell cat debian/nbdd.docs)
SOURCES = tar --create --sort=name --owner=0 --group=0 --mtime=@0 --exclude=__pycache__ --exclude=.mypy_cache $(DEB_SOURCES)

# $(call apt,PACKAGES,WHAT FOR): a no-op if they are there already. Another apt may hold the lock for a while, and a fresh
# machine has no package lists.
define apt
missing=(); for package in $(1); do \
  dpkg-query -W -f='$${Status}' "$$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$$package"); done; \
if (($${#missing[@]})); then \
  echo "== apt: $${missing[*]} ($(2))"; \
  (($$(id -u) == 0)) || { echo "Not root. Install them first: apt-get install $${missing[*]}" >&2; exit 1; }; \
  for try in 1 2 3 4 5; do \
    if DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=600 install -y --no-install-recommends \
      "$${missing[@]}" >/dev/null; then break; fi; \
    ((try < 5)) || { echo "apt can't install $${missing[*]}: see above." >&2; exit 1; }; \
    sleep $$((try * 3)); apt-get -qq update || true; \
  done; \
fi
endef

.PHONY: help
help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

.PHONY: deps
deps: $(VENV)/.stamp ## the tools for the work on the tree, in .venv

# pyproject.toml alone says what is needed; nbdd itself runs from the tree and is not installed.
$(VENV)/.stamp: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "nbdd needs Python 3.11 or later; $(PYTHON) is $$($(PYTHON) -V). Name another: make PYTHON=python3.13" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { $(call apt,python3-venv,python3 has no venv module); }
	@echo "== pip: dependencies of nbdd and of its tests, into $(VENV)"
	@[ -x $(PY) ] || $(PYTHON) -m venv $(VENV)
	@$(PY) -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	  print(*p["dependencies"], *p["optional-dependencies"]["dev"], sep="\n")' >$(VENV)/requirements.txt
	@$(PY) -m pip --disable-pip-version-check install --quiet --root-user-action=ignore -r $(VENV)/requirements.txt
	@touch $@

.PHONY: check
check: deps host-tools ## lint, format, types, units, fast tests: seconds, no root
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-logo
	$(PY) -m nbdd --check config
	$(PY) -m pytest -q -n 2 $(CHECK_TESTS)

# Without them, and without root to install them, the tests that need them are skipped and say so.
.PHONY: host-tools
host-tools:
	@command -v systemd-analyze >/dev/null || (($$(id -u) != 0)) || { $(call apt,systemd,systemd-analyze checks the units); }
	@command -v mandoc >/dev/null || (($$(id -u) != 0)) || { $(call apt,mandoc,it checks the manual pages); }
	@PATH=$$PATH:/usr/sbin; command -v apparmor_parser >/dev/null || (($$(id -u) != 0)) || \
	  { $(call apt,apparmor,it reads the profile); }
	@command -v zsh >/dev/null && command -v fish >/dev/null || (($$(id -u) != 0)) || \
	  { $(call apt,zsh fish,what they complete is tested in them); }
	@command -v dbus-daemon >/dev/null || (($$(id -u) != 0)) || { $(call apt,dbus,the tests of the bus run a private one); }
# promtool checks the alerts. Not by apt: its package, prometheus, is 96 MB and starts a server; the one program is taken out.
	@command -v promtool $(VENV)/bin/promtool >/dev/null || ! command -v apt-get dpkg-deb >/dev/null || { \
	  echo "== promtool, from Debian's package prometheus, into $(VENV)"; mkdir -p $(VENV)/bin; \
	  work=$$(mktemp -d); trap 'rm -rf "$$work"' EXIT; chmod 755 "$$work"; \
	  (cd "$$work" && apt-get -qq download prometheus >/dev/null 2>&1 && \
	    dpkg-deb --fsys-tarfile prometheus_*.deb | tar --extract ./usr/bin/promtool) && \
	  mv "$$work/usr/bin/promtool" $(VENV)/bin/ || echo "== apt can't get it; the tests of the alerts are skipped"; }
	@command -v node >/dev/null || command -v duk >/dev/null || (($$(id -u) != 0)) || { $(call apt,duktape,the example of a polkit rule is run); }
	@command -v desktop-file-validate >/dev/null || (($$(id -u) != 0)) || { $(call apt,desktop-file-utils,desktop entries are checked); }
	@command -v appstreamcli >/dev/null || (($$(id -u) != 0)) || { $(call apt,appstream,the description for software centres is checked); }

.PHONY: man
man: deps ## the manual pages, from man/*.in and from what the programs say of themselves
	@$(PY) man/generate.py

# A screen without a monitor, and a program that shows notifications on it.
.PHONY: desktop-tools
desktop-tools:
	@(($$(id -u) != 0)) || { $(call apt,xvfb dunst,nbdd-notify is tested on a screen); }

.PHONY: screenshots
screenshots: deps host-tools desktop-tools ## docs/screenshots, from what nbdd-notify and nbdd-open show
	@$(PY) -m tests.desktop

# CHECKED=yes leaves out what `make check` has just run. What is said of the package needs no guest, and a quarter of
# the time both cores wait for guests: it is looked at beside the tests, and shown after them.
.PHONY: test
test: deps host-tools desktop-tools lint-tools deb ## every test, the guests of both Debians included
	@echo "== everything is in place after $$(($$(date +%s) - $(START))) s; now every test, here and in the guests"
	@said=$$(mktemp); trap 'rm -f "$$said"' EXIT; \
	$(BESIDE) lint-deb reproducible >"$$said" 2>&1 & package=$$!; \
	tests=0; $(PY) -m pytest tests -n $(WORKERS) $(GROUPS) $(if $(CHECKED),$(CHECK_TESTS:%=--ignore=%)) || tests=$$?; \
	status=0; wait $$package || status=$$?; cat "$$said"; exit $$((tests ? tests : status))

.PHONY: prove
prove: deps deb ## the promises of docs/reliability.md with their full numbers, in guests of both Debians: an hour
	@NBDD_TESTS=full $(PY) -m pytest tests -m guest -n $(WORKERS) $(GROUPS)

.PHONY: demo
demo: deps deb ## attach, use and detach a device on a real kernel, shown step by step
	@$(PY) -m tests.guest.demo

.PHONY: chaos
chaos: deps deb ## filesystems, a database and git, while everything fails (GUEST=debian12 MINUTES=60 SEED=7)
	@$(PY) -m tests.chaos --guest $(or $(GUEST),debian13) --minutes $(or $(MINUTES),10) $(if $(SEED),--seed $(SEED))

.PHONY: vm
vm: deps deb ## a shell in a guest with nbdd installed (GUEST=debian12 or debian13)
	@$(PY) -m tests.guest shell $(or $(GUEST),debian13)

# Built from a copy, so that the tree stays clean, and with the system's own Python, whatever PATH says. The checksum of
# everything that goes in stands beside the package: the same inputs are never built twice.
.PHONY: deb
deb: ## dist/nbdd_*_all.deb, for Debian 12 and 13
	@$(call apt,$(DEB_PACKAGES),to build the package)
	@mkdir -p dist; \
	sum=$$($(SOURCES) | sha256sum); \
	if [ -e $(DEB) ] && [ "$$(cat dist/.inputs 2>/dev/null)" = "$$sum" ]; then echo "== $(DEB) is up to date"; exit 0; fi; \
	work=$$(mktemp -d); trap 'rm -rf "$$work"' EXIT; \
	mkdir "$$work/nbdd"; $(SOURCES) | tar --extract --touch --directory="$$work/nbdd"; \
	echo "== building $(DEB)"; \
	(cd "$$work/nbdd" && env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME="$$work" LC_ALL=C.UTF-8 \
	  dpkg-buildpackage --build=binary --no-sign >"$$work/log" 2>&1) || { tail -n 60 "$$work/log" >&2; exit 1; }; \
	rm -f dist/*.deb; cp "$$work"/nbdd_*_all.deb dist/; echo "$$sum" >dist/.inputs; \
	ls -l $(DEB)

.PHONY: lint-tools
lint-tools:
	@$(call apt,lintian,to check the package)

# The source package too, as only it shows what stands in debian/. An "I:" is worth a look and fails nothing: each release of
# lintian has new ones.
.PHONY: lint-deb
lint-deb: deb lint-tools ## what Debian's lintian says of the package and of its source
	@work=$$(mktemp -d); trap 'rm -rf "$$work"' EXIT; \
	mkdir "$$work/nbdd"; $(SOURCES) | tar --extract --directory="$$work/nbdd"; \
	(cd "$$work" && dpkg-source --build nbdd >/dev/null); \
	lintian --fail-on=error,warning --display-info --tag-display-limit=0 --allow-root $(DEB) "$$work"/*.dsc; \
	echo "== lintian has no complaint about $(DEB) and its source"

.PHONY: wheel
wheel: deps ## dist/nbdd-*.whl
	@rm -f dist/*.whl; $(PY) -m pip --disable-pip-version-check wheel --quiet --no-deps --wheel-dir dist .
	@ls -l $(WHEEL)

# Once more, with all that differs from machine to machine and must not matter: the folder, the files' times and modes, umask,
# time zone, language, and the order of Python's sets. Not the tools: other versions of these may build something else.
.PHONY: reproducible
reproducible: deb wheel ## build both again under other circumstances, and compare
	@umask 0077; work=$$(mktemp -d); trap 'rm -rf "$$work"' EXIT; \
	there="$$work/some/other/folder"; mkdir -p "$$there"; \
	$(SOURCES) | tar --extract --no-same-permissions --directory="$$there"; \
	other=(HOME="$$work" TZ=Asia/Kathmandu LC_ALL=C PYTHONHASHSEED=7); \
	echo "== building $(DEB) and $(WHEEL) a second time"; \
	env -C "$$there" "$${other[@]}" $(abspath $(PY)) -m pip --disable-pip-version-check wheel --quiet --no-deps \
	  --wheel-dir "$${there%/*}" .; \
	env -C "$$there" -u SOURCE_DATE_EPOCH -u MAKEFLAGS "$${other[@]}" PATH=/usr/sbin:/usr/bin:/sbin:/bin \
	  dpkg-buildpackage --build=binary --no-sign >"$$work/log" 2>&1 || { tail -n 60 "$$work/log" >&2; exit 1; }; \
	for built in $(DEB) $(WHEEL); do \
	  cmp "$$built" "$${there%/*}/$${built##*/}" || \
	    { echo "$$built is not reproducible: two builds of the same sources differ." >&2; exit 1; }; \
	  sha256sum "$$built"; \
	done

# See docs/releasing.md. Others can't build a tree again that has changes of its own.
.PHONY: release
release: ## what is to be published, in dist/, from a commit whose changelogs name a day
	@[ -z "$$(git status --porcelain)" ] || { echo "There are changes that are not committed: git status" >&2; exit 1; }
	@! grep -q '^## $(VERSION), not released' CHANGELOG.md || \
	  { echo "CHANGELOG.md says that $(VERSION) is not released yet: give it its day." >&2; exit 1; }
	@rm -rf dist
	@$(MAKE) lint-deb reproducible
	@cd dist && sha256sum $(notdir $(DEB) $(WHEEL)) >SHA256SUMS
	@echo "== dist/ holds nbdd $(VERSION), commit $$(git rev-parse HEAD)"

.PHONY: clean
clean: ## remove what was built here; the cached guests stay
	rm -rf $(VENV) build dist .mypy_cache .import_linter_cache .ruff_cache .pytest_cache .hypothesis tests/failures
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
