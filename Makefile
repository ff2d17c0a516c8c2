# aibilling_polar: price AI usage exactly and deliver it to Polar

EXTENSION = aibilling_polar
# The control file is the one place that states the version.
EXTVERSION := $(shell sed -n "s/^default_version = '\(.*\)'/\1/p" $(EXTENSION).control)
PGFILEDESC = "aibilling_polar - price AI usage and deliver it to Polar"

MODULE_big = aibilling_polar
OBJS = \
	src/aibilling_polar.o \
	src/config.o \
	src/cost.o \
	src/functions.o \
	src/http.o \
	src/idset.o \
	src/normalize.o \
	src/outbox.o \
	src/polar.o \
	src/price.o \
	src/row.o \
	src/server.o \
	src/shipper.o \
	src/usage.o \
	src/wake.o \
	src/worker.o

# An install script is a name with "--"; every other file in sql/ is a test.
DATA = $(wildcard sql/$(EXTENSION)--*.sql) $(wildcard data/$(EXTENSION)-*.json)

PG_CPPFLAGS = -DABP_VERSION='"$(EXTVERSION)"' $(shell pkg-config --cflags libcurl)
PG_CFLAGS = -Wall -Wextra -Wno-unused-parameter -Wno-sign-compare -Wno-missing-field-initializers
SHLIB_LINK = $(shell pkg-config --libs libcurl)

PG_CONFIG ?= pg_config
PGXS := $(shell $(PG_CONFIG) --pgxs)
include $(PGXS)
