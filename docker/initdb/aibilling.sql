-- Run once, when the database is new.
CREATE EXTENSION aibilling_polar;
SELECT aibilling.load_bundled_prices();
CREATE SERVER polar FOREIGN DATA WRAPPER polar
  OPTIONS (environment 'sandbox', event_name 'llm_usage', access_token_file '/var/run/postgresql/polar.token');
SELECT aibilling.create_usage_table('usage', server => 'polar');
