-- What an extension consists of, in words: its members and what belongs to these, with every property
-- that has a meaning outside of the catalogues.
WITH extension AS (
	SELECT * FROM pg_extension WHERE extname = 'aibilling_polar'
), member AS (
	SELECT d.classid, d.objid FROM pg_depend d JOIN extension e ON d.refobjid = e.oid
	WHERE d.refclassid = 'pg_extension'::regclass AND d.deptype = 'e'
), relation AS (
	SELECT objid AS oid FROM member WHERE classid = 'pg_class'::regclass
	UNION SELECT indexrelid FROM pg_index JOIN member ON objid = indrelid AND classid = 'pg_class'::regclass
), acl (classid, objid, acl, standard) AS (
	SELECT 'pg_proc'::regclass::oid, oid, proacl, acldefault('f', proowner) FROM pg_proc
	UNION ALL SELECT 'pg_class'::regclass, oid, relacl, acldefault(CASE relkind WHEN 'S' THEN 's'::"char" ELSE 'r' END, relowner) FROM pg_class
), privilege (classid, objid, objsubid, since, item) AS (
	-- Where all are those by default, this is written down or not: by pg_upgrade not.
	SELECT classid, objid, 0, 'now', item::text FROM acl, unnest(coalesce(acl, standard)) item
	UNION ALL SELECT classid, objid, 0, 'made', item::text
		FROM acl LEFT JOIN pg_init_privs i ON i.classoid = classid AND i.objoid = objid AND i.objsubid = 0,
			unnest(coalesce(initprivs, standard)) item
	UNION ALL SELECT classoid, objoid, objsubid, 'made', item::text FROM pg_init_privs i, unnest(initprivs) item
		WHERE objsubid <> 0 OR NOT EXISTS (SELECT FROM acl WHERE classid = classoid AND objid = objoid)
), object (kind, name, what, classid, objid, objsubid) AS (
	SELECT 'member', pg_describe_object(classid, objid, 0), NULL, classid, objid, 0 FROM member
	UNION ALL SELECT 'extension', extname, concat_ws(' ', extversion, extnamespace::regnamespace, extrelocatable, extowner::regrole),
		'pg_extension'::regclass, oid, 0 FROM extension
	UNION ALL SELECT 'dumped', c::regclass::text, w, 0, 0, 0 FROM extension, unnest(extconfig, extcondition) t (c, w)
	UNION ALL SELECT 'schema', nspname, concat_ws(' ', nspacl, nspowner::regrole), 'pg_namespace'::regclass, oid, 0
		FROM pg_namespace JOIN member ON classid = 'pg_namespace'::regclass AND objid = oid
	UNION ALL SELECT 'function', oid::regprocedure::text, (to_jsonb(p) - '{oid,proacl,proargdefaults,prosqlbody,pronamespace,proowner,prorettype,proargtypes,proallargtypes}'::text[]
			|| jsonb_build_array(proowner::regrole, pg_get_function_arguments(oid), pg_get_function_result(oid), pg_get_functiondef(oid)))::text,
		'pg_proc'::regclass, oid, 0
		FROM pg_proc p JOIN member ON classid = 'pg_proc'::regclass AND objid = oid
	UNION ALL SELECT 'relation', oid::regclass::text, concat_ws(' ', relkind, relpersistence, reloptions, relrowsecurity,
			relforcerowsecurity, relreplident, relam, relispartition, relowner::regrole,
			(SELECT array_agg(inhparent::regclass ORDER BY inhseqno) FROM pg_inherits WHERE inhrelid = oid), pg_get_viewdef(oid), pg_get_indexdef(oid)),
		'pg_class'::regclass, oid, 0
		FROM pg_class JOIN relation USING (oid) WHERE relkind <> 'i'
	UNION ALL SELECT 'index', oid::regclass::text, concat_ws(' ', pg_get_indexdef(oid), indisunique, indisprimary, indisvalid, indisclustered,
			indisreplident, indimmediate), 'pg_class'::regclass, oid, 0
		FROM relation JOIN pg_index ON indexrelid = oid
	UNION ALL SELECT 'column', r.oid::regclass || '.' || attname, concat_ws(' ', attnum, format_type(atttypid, atttypmod), attnotnull,
			attidentity, attgenerated, attislocal, attinhcount, attcollation, attstorage, attcompression, attacl,
			-- but for what some builds of PostgreSQL note there on their own: the WAL position of the change
			(SELECT array_agg(o) FROM unnest(attoptions) o WHERE o !~ '^pg_attver='), pg_get_expr(adbin, adrelid)),
		'pg_class'::regclass, r.oid, attnum
		FROM relation r JOIN pg_attribute ON attrelid = r.oid
			LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
		WHERE attnum > 0
	UNION ALL SELECT 'sequence', seqrelid::regclass::text, (to_jsonb(q) - 'seqrelid')::text, 0, 0, 0
		FROM pg_sequence q JOIN relation ON oid = seqrelid
	UNION ALL SELECT 'constraint', conrelid::regclass || '.' || conname, pg_get_constraintdef(c.oid) || convalidated,
		'pg_constraint'::regclass, c.oid, 0
		FROM pg_constraint c JOIN relation r ON r.oid = conrelid
	UNION ALL SELECT 'trigger', tgrelid::regclass || '.' || tgname, pg_get_triggerdef(t.oid) || tgenabled::text,
		'pg_trigger'::regclass, t.oid, 0
		FROM pg_trigger t JOIN relation r ON r.oid = tgrelid
	UNION ALL SELECT 'policy', polrelid::regclass || '.' || polname,
		concat_ws(' ', polcmd, polpermissive, polroles, pg_get_expr(polqual, polrelid), pg_get_expr(polwithcheck, polrelid)),
		'pg_policy'::regclass, p.oid, 0
		FROM pg_policy p JOIN relation r ON r.oid = polrelid
	UNION ALL SELECT 'rule', ev_class::regclass || '.' || rulename, pg_get_ruledef(w.oid), 'pg_rewrite'::regclass, w.oid, 0
		FROM pg_rewrite w JOIN relation r ON r.oid = ev_class
	UNION ALL SELECT 'type', format_type(oid, NULL), concat_ws(' ', typtype, typacl, typcategory, typowner::regrole, (SELECT array_agg(
			attname || ' ' || format_type(atttypid, atttypmod) ORDER BY attnum) FROM pg_attribute WHERE attrelid = typrelid AND attnum > 0)),
		'pg_type'::regclass, oid, 0
		FROM pg_type JOIN member ON classid = 'pg_type'::regclass AND objid = oid
	UNION ALL SELECT 'wrapper', fdwname, concat_ws(' ', fdwhandler, fdwvalidator::regproc, fdwacl, fdwoptions, fdwowner::regrole),
		'pg_foreign_data_wrapper'::regclass, oid, 0
		FROM pg_foreign_data_wrapper JOIN member ON classid = 'pg_foreign_data_wrapper'::regclass AND objid = oid
	UNION ALL SELECT 'event trigger', evtname, concat_ws(' ', evtevent, evtfoid::regproc, evtenabled, evttags, evtowner::regrole),
		'pg_event_trigger'::regclass, oid, 0
		FROM pg_event_trigger JOIN member ON classid = 'pg_event_trigger'::regclass AND objid = oid
	UNION ALL SELECT 'default privileges', concat_ws(' ', defaclrole::regrole, defaclobjtype), defaclacl::text, 0, 0, 0
		FROM pg_default_acl JOIN member ON classid = 'pg_namespace'::regclass AND objid = defaclnamespace
	UNION ALL SELECT DISTINCT 'dependency', pg_describe_object(d.classid, d.objid, d.objsubid),
		concat_ws(' ', deptype, pg_describe_object(refclassid, refobjid, refobjsubid)), 0, 0, 0
		FROM pg_depend d
			LEFT JOIN member m ON (m.classid, m.objid) = (d.classid, d.objid)
			LEFT JOIN relation r ON d.classid = 'pg_class'::regclass AND r.oid = d.objid
		WHERE coalesce(m.objid, r.oid) IS NOT NULL AND deptype <> 'e'
)
SELECT kind, name, what, col_description(nullif(o.objid, 0), nullif(o.objsubid, 0)),
	CASE o.objsubid WHEN 0 THEN obj_description(o.objid, nullif(o.classid, 0)::regclass::name) END,
	(SELECT string_agg(since || ' ' || item, ', ' ORDER BY since, item) FROM privilege p
	 WHERE p.classid = o.classid AND p.objid = o.objid AND p.objsubid = o.objsubid)
FROM object o
UNION ALL
SELECT 'shipped', 'service_tier_rule', r::text, NULL, NULL, NULL FROM aibilling.service_tier_rule r WHERE shipped
ORDER BY 1, 2, 3
