# aibilling_polar: price AI usage exactly and deliver it to Polar

MODULE_big = aibilling_polar
# Every source file: PGXS, below, sets srcdir, as the sources may lie elsewhere (VPATH).
OBJS = $(patsubst $(srcdir)/%.c,%.o,$(wildcard $(srcdir)/src/*.c $(srcdir)/src/*/*.c))

EXTENSION = aibilling_polar
# In sql/, a name with "--" is a script of a version that is out; any other file is a test.
DATA = $(patsubst $(srcdir)/%,%,$(wildcard $(srcdir)/sql/$(EXTENSION)--*.sql $(srcdir)/data/$(EXTENSION)-*.json))
# The scripts of this version are joined from parts, see below.
INSTALL_SQL = $(EXTENSION)--$(EXTVERSION).sql
UPDATE_SQL = $(EXTENSION)--1.1--$(EXTVERSION).sql
DATA_built = $(INSTALL_SQL) $(UPDATE_SQL)
PGFILEDESC = "aibilling_polar - price AI usage and deliver it to Polar"

# In this order; lint tells when a file of sql/ or specs/ is not named here.
REGRESS = \
	install \
	pricing \
	cost \
	normalize \
	catalogue \
	server \
	usage \
	event \
	rows \
	columns \
	outbox \
	prepared
REGRESS_OPTS = --load-extension=$(EXTENSION) --encoding=UTF8 --no-locale

ISOLATION = \
	prices \
	prices_prepared \
	delivery \
	attach \
	shared \
	corrections
ISOLATION_OPTS = --load-extension=$(EXTENSION) --encoding=UTF8 --no-locale

# TAP tests start servers of their own, for minutes and not as root: "make prove_installcheck" runs them,
# or "make installcheck" with PROVE_TESTS.
ifneq ($(PROVE_TESTS),)
TAP_TESTS = 1
endif

# The control file is the one place that states the version.
EXTVERSION = $(shell sed -n "s/^default_version = '\(.*\)'/\1/p" $(srcdir)/$(EXTENSION).control)

PG_CPPFLAGS = -I$(srcdir)/src -DABP_VERSION='"$(EXTVERSION)"' $(shell pkg-config --cflags libcurl)
PG_CFLAGS = -Wall -Wextra -Werror=implicit-function-declaration -Wno-unused-parameter -Wno-sign-compare -Wno-missing-field-initializers
SHLIB_LINK = $(shell pkg-config --libs libcurl)

EXTRA_CLEAN = tmp_check output_iso $(EXTENSION)-*.tar.gz $(EXTENSION)-*.zip

PG_CONFIG ?= pg_config
PGXS := $(shell $(PG_CONFIG) --pgxs)
include $(PGXS)

# PGXS tracks no headers, and makes no directories for objects in a VPATH build.
$(OBJS): $(wildcard $(srcdir)/src/*.h $(srcdir)/src/*/*.h) $(srcdir)/Makefile $(srcdir)/$(EXTENSION).control
ifdef VPATH
$(shell $(MKDIR_P) $(sort $(dir $(OBJS))))
endif

# A new install runs all parts.  An update changes the tables of the version before, runs the parts again but for
# those whose objects that version has and SQL cannot replace (*.once.sql), and brings the rows along.
PARTS = $(sort $(wildcard $(srcdir)/sql/parts/*.sql))
$(INSTALL_SQL): $(PARTS)
$(UPDATE_SQL): $(srcdir)/sql/update/before.sql $(filter-out %.once.sql,$(PARTS)) $(srcdir)/sql/update/after.sql
$(DATA_built): $(srcdir)/sql/parts $(srcdir)/Makefile
	awk 'FNR == 1 && NR > 1 { print "" } { print }' $(filter %.sql,$^) >$@

.PHONY: lint indent check-indent bench dist prove_installcheck

prove_installcheck:
	$(prove_installcheck)

lint:
	@dev/lint

indent:
	@PG_CONFIG=$(PG_CONFIG) dev/indent

check-indent:
	@PG_CONFIG=$(PG_CONFIG) dev/indent --check

bench:
	@PG_CONFIG=$(PG_CONFIG) dev/bench

dist:
	@$(srcdir)/dev/dist

# For dev/test: the words of a variable.
print-%:
	@echo $($*)
