# PostgreSQL with aibilling_polar, preloaded.  BASE is an official image of PostgreSQL for Debian; what one may
# give it (environment, /docker-entrypoint-initdb.d, the command) one may give this.
#
#   AIBILLING_DATABASES     databases that get a worker, comma-separated
#   AIBILLING_TOKEN_FILE    the mounted secret with Polar's token, by default /run/secrets/polar_token.  At start
#                           it is copied to /var/run/postgresql/polar.token, for CREATE SERVER's access_token_file.
ARG BASE=postgres:18-trixie

FROM ${BASE} AS build
RUN apt-get update && \
	apt-get install -y --no-install-recommends build-essential libcurl4-openssl-dev pkgconf "postgresql-server-dev-$PG_MAJOR"
COPY . /src
RUN make -C /src PG_CONFIG="/usr/lib/postgresql/$PG_MAJOR/bin/pg_config" with_llvm=no \
		INSTALL_STRIP_FLAG=-s DESTDIR=/installed all install

FROM ${BASE}
RUN apt-get update && \
	apt-get install -y --no-install-recommends ca-certificates libcurl4 && \
	rm -rf /var/lib/apt/lists/* && \
	echo "shared_preload_libraries = 'aibilling_polar'" >>"/usr/share/postgresql/$PG_MAJOR/postgresql.conf.sample"
COPY --from=build /installed /
COPY docker/aibilling-entrypoint.sh /usr/local/bin/
ENTRYPOINT ["aibilling-entrypoint.sh"]
CMD ["postgres"]
