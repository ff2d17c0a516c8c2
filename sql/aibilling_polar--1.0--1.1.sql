\echo Use "ALTER EXTENSION aibilling_polar UPDATE TO '1.1'" to load this file. \quit

-- What a server says to a role's own token is kept apart from what it says to
-- the token that all share; and each pauses the delivery of his own tables.

ALTER TABLE aibilling.server_state
	ADD COLUMN role oid NOT NULL DEFAULT 0,
	DROP CONSTRAINT server_state_pkey,
	ADD CONSTRAINT server_state_pkey PRIMARY KEY (server, role);
COMMENT ON TABLE aibilling.server_state IS
'Private: servers that are paused or wait after failures, for all or for one role, so that a restart does not forget it; shown by aibilling.status';
COMMENT ON COLUMN aibilling.server_state.role IS
'The owner of usage tables, if the state is of the token in its own user mapping, or of its own pause; 0: of all others together';

COMMENT ON FUNCTION aibilling.pause(name) IS
'Sends nothing to the foreign server until aibilling.resume(); requests in flight end. NULL: all servers. By the owner of the server: nothing of anyone''s; by others: nothing from the usage tables that they own';
COMMENT ON FUNCTION aibilling.resume(name) IS
'Ends a pause, whether aibilling.pause() or the server''s answer began it, and every wait after failures, and tries at once. NULL: all servers. A pause of the whole server is ended by its owner only, one of usage tables by their owner';

COMMENT ON COLUMN aibilling.price_quarantine.provider IS 'As aibilling.price.provider';
COMMENT ON COLUMN aibilling.price_quarantine.model IS 'As aibilling.price.model';
COMMENT ON COLUMN aibilling.price_quarantine.service_tier IS 'As aibilling.price.service_tier';
COMMENT ON COLUMN aibilling.price_quarantine.context_above IS 'As aibilling.price.context_above';
COMMENT ON COLUMN aibilling.price_quarantine.valid_from IS 'As aibilling.price.valid_from';
COMMENT ON COLUMN aibilling.price_quarantine.source IS 'As aibilling.price.source';
COMMENT ON COLUMN aibilling.price_quarantine.daily_from IS 'As aibilling.price.daily_from';
COMMENT ON COLUMN aibilling.price_quarantine.daily_to IS 'As aibilling.price.daily_to';
COMMENT ON COLUMN aibilling.price_quarantine.input IS 'As aibilling.price.input';
COMMENT ON COLUMN aibilling.price_quarantine.output IS 'As aibilling.price.output';
COMMENT ON COLUMN aibilling.price_quarantine.cache_read IS 'As aibilling.price.cache_read';
COMMENT ON COLUMN aibilling.price_quarantine.cache_write IS 'As aibilling.price.cache_write';
COMMENT ON COLUMN aibilling.price_quarantine.cache_write_1h IS 'As aibilling.price.cache_write_1h';
COMMENT ON COLUMN aibilling.price_quarantine.reasoning IS 'As aibilling.price.reasoning';
COMMENT ON COLUMN aibilling.price_quarantine.request IS 'As aibilling.price.request';
COMMENT ON COLUMN aibilling.price_quarantine.web_search IS 'As aibilling.price.web_search';
COMMENT ON COLUMN aibilling.price_quarantine.units IS 'As aibilling.price.units';
COMMENT ON COLUMN aibilling.price_quarantine.discount IS 'As aibilling.price.discount';
COMMENT ON COLUMN aibilling.price_quarantine.multiplier IS 'As aibilling.price.multiplier';
