--
-- Options of servers and user mappings of foreign data wrapper polar
--
-- How they are read (defaults, token files) is tested where they are used.
--
SET client_min_messages = warning;
CREATE ROLE regress_server_super SUPERUSER;
CREATE ROLE regress_server_owner;
CREATE ROLE regress_server_files IN ROLE pg_read_server_files;
CREATE ROLE regress_server_other;
RESET client_min_messages;

-- Tries an option's value on server "s" and says what the validator says.
CREATE FUNCTION try_option(option text, value text) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
	message text;
	detail text;
	hint text;
BEGIN
	EXECUTE format('ALTER SERVER s OPTIONS (%s %I %L)',
		CASE WHEN EXISTS (SELECT FROM pg_foreign_server, pg_options_to_table(srvoptions)
			WHERE srvname = 's' AND option_name = option)
		THEN 'SET' ELSE 'ADD' END, option, value);
	RETURN 'ok';
EXCEPTION WHEN OTHERS THEN
	GET STACKED DIAGNOSTICS message = MESSAGE_TEXT, detail = PG_EXCEPTION_DETAIL,
		hint = PG_EXCEPTION_HINT;
	RETURN concat_ws(E'\n', message, nullif(detail, ''), nullif(hint, ''));
END $$;

-- The wrapper itself has neither handler nor options
SELECT fdwname, fdwhandler, fdwvalidator::regproc, fdwacl
FROM pg_foreign_data_wrapper WHERE fdwname = 'polar';
ALTER FOREIGN DATA WRAPPER polar OPTIONS (ADD debug 'true');

-- A server must say where events go
CREATE SERVER s FOREIGN DATA WRAPPER polar;
CREATE SERVER s FOREIGN DATA WRAPPER polar OPTIONS (event_name 'llm_usage');
CREATE SERVER s FOREIGN DATA WRAPPER polar OPTIONS (environment 'prod');
CREATE SERVER s FOREIGN DATA WRAPPER polar OPTIONS (environment 'sandbox');
ALTER SERVER s OPTIONS (DROP environment);
ALTER SERVER s OPTIONS (SET environment 'production');
ALTER SERVER s OPTIONS (ADD url 'https://gateway.example.com/polar/', DROP environment);
ALTER SERVER s OPTIONS (DROP url);
ALTER SERVER s OPTIONS (ADD environment 'sandbox');

-- Unknown options: the closest, or all of them
ALTER SERVER s OPTIONS (ADD batchsize '10');
ALTER SERVER s OPTIONS (ADD event_nam 'x');
ALTER SERVER s OPTIONS (ADD password 'x');
ALTER SERVER s OPTIONS (ADD access_token 'x');
CREATE USER MAPPING FOR CURRENT_USER SERVER s OPTIONS (token 'x');
CREATE USER MAPPING FOR CURRENT_USER SERVER s OPTIONS (access_tokn 'x');
CREATE USER MAPPING FOR CURRENT_USER SERVER s OPTIONS (access_token_file '/x');
SELECT aibilling.polar_fdw_validator(ARRAY[repeat('x', 300) || '=1'], 'pg_user_mapping'::regclass);

-- URLs
\pset format unaligned
\pset recordsep '\n\n'
SELECT url, try_option('url', url)
FROM (VALUES
	(1, 'https://api.polar.sh'),
	(2, 'https://API.example.com:8443/base/'),
	(3, 'https://10.0.0.1'),
	(4, 'https://polar_gateway/a%20b'),
	(5, 'http://127.0.0.1:8080'),
	(6, 'http://127.255.3.4/'),
	(7, 'http://localhost'),
	(8, 'http://LocalHost:1'),
	(9, 'http://[::1]:65535/x'),
	(10, 'https://[::1]'),
	(20, ''),
	(21, 'api.polar.sh'),
	(22, '//api.polar.sh'),
	(23, 'ftp://api.polar.sh'),
	(24, 'HTTPS://api.polar.sh'),
	(25, 'https:/api.polar.sh'),
	(26, 'https://'),
	(27, 'https:///path'),
	(28, 'https://:443'),
	(29, ' https://api.polar.sh'),
	(30, 'https://api.polar.sh '),
	(31, E'https://api.polar.sh\r\nX: y'),
	(32, 'https://api.polar.sh\@evil.example'),
	(33, 'https://évil.example'),
	(34, 'https://user:secret@api.polar.sh'),
	(35, 'http://127.0.0.1@evil.example'),
	(36, 'https://api.polar.sh#x'),
	(37, 'https://api.polar.sh/?x=y'),
	(38, 'https://api.polar.sh/%zz'),
	(39, 'https://api%2epolar.sh'),
	(40, 'https://api..polar.sh'),
	(41, 'https://api.polar.sh.'),
	(42, 'https://-x.example'),
	(43, 'https://x-.example'),
	(44, 'https://api.polar.sh:'),
	(45, 'https://api.polar.sh:0'),
	(46, 'https://api.polar.sh:080'),
	(47, 'https://api.polar.sh:65536'),
	(48, 'https://api.polar.sh:4294967739'),
	(49, 'https://api.polar.sh:80:80'),
	(50, 'https://api.polar.sh:8x'),
	(51, 'https://[::2]'),
	(52, 'http://[::ffff:127.0.0.1]'),
	(53, 'http://[::1].evil.example'),
	(54, 'http://[::1'),
	(55, 'https://::1'),
	(56, 'http://api.polar.sh'),
	(57, 'http://127.0.0.1.evil.example'),
	(58, 'http://localhost.evil.example'),
	(59, 'http://localhost.'),
	(60, 'http://notlocalhost'),
	(61, 'http://local'),
	(62, 'http://10.0.0.1'),
	(63, 'http://128.0.0.1'),
	(64, 'http://0.0.0.0'),
	(65, 'http://127.1'),
	(66, 'http://2130706433'),
	(67, 'http://0177.0.0.1'),
	(68, 'http://127.0.0.01'),
	(69, 'http://0x7f.0.0.1'),
	(70, 'http://0x7f000001'),
	(71, 'http://127.0.0.0x1'),
	(72, 'http://127.0.0.256'),
	(73, 'http://127.0.0.1.1'),
	(74, 'https://127.0.0.1.'),
	(75, 'https://api.polar.sh/v1/events/ingest/')) v(n, url)
ORDER BY n;

-- The other options, good and bad
SELECT option, left(value, 40) AS value, try_option(option, value)
FROM (VALUES
	(1, 'environment', 'production'),
	(2, 'environment', 'Production'),
	(10, 'event_name', 'llm_usage'),
	(11, 'event_name', 'llm_usage_{provider}_{model}'),
	(12, 'event_name', ''),
	(13, 'event_name', 'llm_{user}'),
	(14, 'event_name', 'llm_{provider'),
	(15, 'event_name', 'llm}'),
	(20, 'customer_id_key', 'org'),
	(21, 'customer_id_key', ''),
	(22, 'external_customer_id_key', 'userId'),
	(23, 'external_customer_id_key', ''),
	(30, 'tag_prefix', 'label.'),
	(31, 'tag_prefix', ''),
	(32, 'tag_prefix', 'cost_'),
	(33, 'tag_prefix', repeat('x', 40)),
	(40, 'access_token_file', '/etc/postgresql/polar.token'),
	(41, 'access_token_file', 'polar_oat_secret'),
	(42, 'access_token_file', ''),
	(43, 'access_token_file', E'/etc/\nx'),
	(44, 'access_token_file', '/' || repeat('x', 1024)),
	(45, 'ca_file', '/etc/ssl/ca.pem'),
	(46, 'ca_file', 'ca.pem'),
	(50, 'proxy', 'http://proxy.example.com:3128'),
	(51, 'proxy', 'socks5h://10.0.0.1:1080'),
	(52, 'proxy', 'proxy.example.com:3128'),
	(53, 'proxy', 'http://proxy.example.com'),
	(54, 'proxy', 'http://proxy.example.com:3128/x'),
	(55, 'proxy', 'http://user:secret@proxy.example.com:3128'),
	(60, 'timeout', '500'),
	(61, 'timeout', '30s'),
	(62, 'timeout', '10min'),
	(63, 'timeout', '0'),
	(64, 'timeout', '11min'),
	(65, 'timeout', '-1'),
	(66, 'timeout', 'soon'),
	(67, 'timeout', '5 parsecs'),
	(68, 'timeout', '99999999999'),
	(70, 'batch_size', '1'),
	(71, 'batch_size', '1000'),
	(72, 'batch_size', '0'),
	(73, 'batch_size', '1001'),
	(74, 'batch_size', '1.5'),
	(75, 'batch_size', '0x10'),
	(76, 'batch_size', ''),
	(77, 'batch_size', '10kB'),
	(80, 'batch_bytes', '10kB'),
	(81, 'batch_bytes', '10485760'),
	(82, 'batch_bytes', '10MB'),
	(83, 'batch_bytes', '10239'),
	(84, 'batch_bytes', '11MB'),
	(85, 'batch_bytes', '1 GiB'),
	(90, 'max_in_flight', '1'),
	(91, 'max_in_flight', '32'),
	(92, 'max_in_flight', '0'),
	(93, 'max_in_flight', '33'),
	(100, 'requests_per_minute', '0'),
	(101, 'requests_per_minute', '60000'),
	(102, 'requests_per_minute', '60001'),
	(103, 'requests_per_minute', '-1'),
	(110, 'unpriced', 'hold'),
	(111, 'unpriced', 'send'),
	(112, 'unpriced', 'drop'),
	(120, 'kind', 'polar'),
	(121, 'kind', 'stripe'),
	(122, 'kind', 'prices'),
	(130, 'format', 'litellm')) v(n, option, value)
ORDER BY n;

\pset format aligned
\pset recordsep '\n'

-- The 128 characters of an event name do not count its fields
SELECT try_option('event_name', repeat('é', 128) || '{model}');
SELECT right(try_option('event_name', repeat('é', 129)), 91);

-- What was accepted; a bad value changed nothing
SELECT option_name, left(option_value, 40)
FROM pg_foreign_server, pg_options_to_table(srvoptions)
WHERE srvname = 's' ORDER BY option_name COLLATE "C";

-- A proxy sees the token of an http:// request
ALTER SERVER s OPTIONS (SET url 'http://localhost:1');
ALTER SERVER s OPTIONS (SET url 'http://localhost:1', SET proxy 'http://127.0.0.1:3128');
DROP SERVER s;

-- Price lists
CREATE SERVER s FOREIGN DATA WRAPPER polar OPTIONS (kind 'prices');
CREATE SERVER s FOREIGN DATA WRAPPER polar
	OPTIONS (kind 'prices', url 'https://models.dev/api.json');
CREATE SERVER s FOREIGN DATA WRAPPER polar
	OPTIONS (kind 'prices', url 'https://models.dev/api.json', format 'csv');
CREATE SERVER s FOREIGN DATA WRAPPER polar
	OPTIONS (kind 'prices', environment 'sandbox', format 'narev');
CREATE SERVER s FOREIGN DATA WRAPPER polar
	OPTIONS (kind 'prices', url 'https://api.narev.ai/v1/prices?page_size=100', format 'narev',
		timeout '1min', ca_file '/ca.pem', proxy 'http://proxy.example.com:1', access_token_file '/t');
SELECT option, try_option(option, 'x')
FROM unnest(ARRAY['environment', 'event_name', 'event_name_function', 'metadata_function',
	'customer_id_key', 'external_customer_id_key', 'tag_prefix', 'batch_size', 'batch_bytes',
	'max_in_flight', 'requests_per_minute', 'unpriced']) WITH ORDINALITY o(option, n)
ORDER BY n;
SELECT value, try_option('format', value)
FROM unnest(ARRAY['litellm', 'models.dev', 'genai-prices', 'openrouter', 'narev', 'polar'])
	WITH ORDINALITY o(value, n)
ORDER BY n;
ALTER SERVER s OPTIONS (DROP format);
DROP SERVER s;

-- Privileges: one needs USAGE on the wrapper, and more for what reaches further
SET ROLE regress_server_owner;
CREATE SERVER s FOREIGN DATA WRAPPER polar OPTIONS (environment 'sandbox');
RESET ROLE;
GRANT USAGE ON FOREIGN DATA WRAPPER polar TO regress_server_owner, regress_server_files;
SET ROLE regress_server_owner;
CREATE SERVER s FOREIGN DATA WRAPPER polar OPTIONS (environment 'sandbox');
ALTER SERVER s OPTIONS (ADD url 'https://evil.example');
ALTER SERVER s OPTIONS (ADD proxy 'https://evil.example:1');
ALTER SERVER s OPTIONS (ADD access_token_file '/etc/passwd');
ALTER SERVER s OPTIONS (ADD ca_file '/etc/passwd');
ALTER SERVER s OPTIONS (ADD event_name 'x', ADD unpriced 'send', ADD timeout '1s');
SELECT aibilling.polar_fdw_validator(ARRAY['environment=sandbox'], 'pg_foreign_server'::regclass);
RESET ROLE;

SET ROLE regress_server_files;
CREATE SERVER f FOREIGN DATA WRAPPER polar
	OPTIONS (environment 'sandbox', access_token_file '/polar.token', ca_file '/ca.pem');
ALTER SERVER f OPTIONS (ADD url 'https://evil.example');
DROP SERVER f;
RESET ROLE;

-- What a superuser has set, the owner may keep, but neither change nor drop
ALTER SERVER s OPTIONS (ADD url 'https://gateway.example.com', ADD access_token_file '/gateway.token');
SET ROLE regress_server_owner;
ALTER SERVER s OPTIONS (ADD batch_size '100');
ALTER SERVER s OPTIONS (SET batch_size '200');
ALTER SERVER s OPTIONS (DROP batch_size);
ALTER SERVER s OPTIONS (SET url 'https://gateway.example.com/');
ALTER SERVER s OPTIONS (SET access_token_file '/other.token');
ALTER SERVER s OPTIONS (ADD proxy 'http://evil.example:1');
ALTER SERVER s OPTIONS (DROP url);
ALTER SERVER s OPTIONS (DROP url, DROP access_token_file);
ALTER SERVER s OPTIONS (SET environment 'production');
CREATE SERVER same FOREIGN DATA WRAPPER polar
	OPTIONS (url 'https://gateway.example.com', access_token_file '/gateway.token');
DROP SERVER same;
RESET ROLE;

-- ... and not put together from two servers
CREATE SERVER s2 FOREIGN DATA WRAPPER polar
	OPTIONS (url 'https://collector.example.com', access_token_file '/collector.token');
ALTER SERVER s2 OWNER TO regress_server_owner;
SET ROLE regress_server_owner;
ALTER SERVER s2 OPTIONS (SET access_token_file '/gateway.token');
ALTER SERVER s2 OPTIONS (DROP access_token_file);
RESET ROLE;
ALTER SERVER s2 OPTIONS (DROP access_token_file);

-- ... nor taken from a server of somebody else's, or of another wrapper
ALTER SERVER s OWNER TO regress_server_super;
CREATE FOREIGN DATA WRAPPER regress_server_fdw;
CREATE SERVER s3 FOREIGN DATA WRAPPER regress_server_fdw
	OPTIONS (url 'https://gateway.example.com', access_token_file '/gateway.token');
ALTER SERVER s3 OWNER TO regress_server_owner;
SET ROLE regress_server_owner;
ALTER SERVER s2 OPTIONS (ADD access_token_file '/gateway.token');
ALTER SERVER s2 OPTIONS (SET url 'https://gateway.example.com');
ALTER SERVER s OPTIONS (ADD batch_size '1');
RESET ROLE;
DROP FOREIGN DATA WRAPPER regress_server_fdw CASCADE;
DROP SERVER s;
DROP SERVER s2;

-- The user's functions
CREATE SCHEMA regress_server_fn;
GRANT USAGE ON SCHEMA regress_server_fn TO regress_server_owner;
CREATE FUNCTION regress_server_fn.name(jsonb) RETURNS text
	LANGUAGE sql AS $$ SELECT 'x' $$;
CREATE FUNCTION regress_server_fn.meta(jsonb) RETURNS jsonb
	LANGUAGE sql AS $$ SELECT $1 $$;
CREATE FUNCTION regress_server_fn."Meta data"(jsonb) RETURNS jsonb
	LANGUAGE sql AS $$ SELECT $1 $$;
CREATE FUNCTION regress_server_fn.rows(jsonb) RETURNS SETOF jsonb
	LANGUAGE sql AS $$ SELECT $1 $$;
CREATE SERVER s FOREIGN DATA WRAPPER polar OPTIONS (environment 'sandbox');
SELECT value, try_option('metadata_function', value)
FROM (VALUES
	(1, 'regress_server_fn.meta'),
	(2, 'REGRESS_SERVER_FN.Meta'),
	(3, 'regress_server_fn."Meta data"'),
	(4, 'meta'),
	(5, ''),
	(6, 'db.regress_server_fn.meta'),
	(7, 'regress_server_fn.'),
	(8, 'regress_server_fn.meta(jsonb)'),
	(9, 'regress_server_fn.meta; DROP TABLE x'),
	(10, 'regress_server_fn."meta'),
	(11, 'regress_server_fn.name'),
	(12, 'regress_server_fn.rows')) v(n, value)
ORDER BY n;
ALTER SERVER s OPTIONS (ADD event_name_function 'regress_server_fn.meta');
ALTER SERVER s OPTIONS (ADD event_name_function 'regress_server_fn.name');
ALTER SERVER s OPTIONS (SET event_name_function 'regress_server_fn."Later"');
ALTER SERVER s OPTIONS (SET event_name_function 'regress_nowhere.later');
ALTER SERVER s OPTIONS (DROP event_name_function, SET metadata_function 'regress_server_fn.meta');

-- They run with their owner's rights, so EXECUTE alone is not enough
ALTER SERVER s OWNER TO regress_server_owner;
SET ROLE regress_server_owner;
ALTER SERVER s OPTIONS (ADD batch_size '1');
ALTER SERVER s OPTIONS (SET metadata_function 'regress_server_fn."Meta data"');
ALTER SERVER s OPTIONS (ADD event_name_function 'regress_server_fn.name');
ALTER SERVER s OPTIONS (ADD event_name_function 'regress_server_fn.later');
RESET ROLE;
ALTER FUNCTION regress_server_fn.name(jsonb) OWNER TO regress_server_owner;
REVOKE ALL ON FUNCTION regress_server_fn.name(jsonb) FROM regress_server_owner, PUBLIC;
SET ROLE regress_server_owner;
ALTER SERVER s OPTIONS (ADD event_name_function 'regress_server_fn.name');
RESET ROLE;
GRANT EXECUTE ON FUNCTION regress_server_fn.name(jsonb) TO regress_server_owner;
REVOKE USAGE ON SCHEMA regress_server_fn FROM regress_server_owner;
SET ROLE regress_server_owner;
ALTER SERVER s OPTIONS (ADD event_name_function 'regress_server_fn.name');
RESET ROLE;
GRANT USAGE ON SCHEMA regress_server_fn TO regress_server_owner;
SET ROLE regress_server_owner;
ALTER SERVER s OPTIONS (ADD event_name_function 'regress_server_fn.name');
RESET ROLE;

-- User mappings
CREATE USER MAPPING FOR regress_server_owner SERVER s OPTIONS (access_token '');
CREATE USER MAPPING FOR regress_server_owner SERVER s OPTIONS (access_token 'secret 1');
CREATE USER MAPPING FOR regress_server_owner SERVER s OPTIONS (access_token E'secret\n');
CREATE USER MAPPING FOR regress_server_owner SERVER s OPTIONS (access_token 'sécret');
SELECT aibilling.polar_fdw_validator(ARRAY['access_token=' || repeat('x', 4097)], 'pg_user_mapping'::regclass);
SELECT aibilling.polar_fdw_validator(ARRAY['access_token=' || repeat('x', 4096)], 'pg_user_mapping'::regclass);
CREATE USER MAPPING FOR regress_server_owner SERVER s OPTIONS (access_token 'polar_oat_1');
CREATE USER MAPPING FOR PUBLIC SERVER s OPTIONS (access_token 'polar_oat_2');
ALTER USER MAPPING FOR regress_server_owner SERVER s OPTIONS (SET access_token ' ');
ALTER USER MAPPING FOR regress_server_owner SERVER s OPTIONS (SET access_token 'polar_oat_3');

-- Who sees a token: its user with USAGE on the server (or ownership of it),
-- the server's owner for PUBLIC's, superusers; nobody else
SELECT usename, umoptions FROM pg_user_mappings WHERE srvname = 's' ORDER BY usename;
SET ROLE regress_server_owner;
SELECT usename, umoptions FROM pg_user_mappings WHERE srvname = 's' ORDER BY usename;
SET ROLE regress_server_other;
SELECT usename, umoptions FROM pg_user_mappings WHERE srvname = 's' ORDER BY usename;
SELECT umoptions FROM pg_user_mapping;
RESET ROLE;

DROP SERVER s CASCADE;
DROP SCHEMA regress_server_fn CASCADE;
DROP FUNCTION try_option;
REVOKE ALL ON FOREIGN DATA WRAPPER polar FROM regress_server_owner, regress_server_files;
DROP ROLE regress_server_super, regress_server_owner, regress_server_files, regress_server_other;
