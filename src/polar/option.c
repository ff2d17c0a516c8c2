/*-------------------------------------------------------------------------
 *
 * option.c
 *	  The value of one option of a server: read and checked.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "commands/defrem.h"
#include "lib/stringinfo.h"
#include "mb/pg_wchar.h"
#include "utils/guc.h"
#include "utils/varlena.h"

#include "polar/limits.h"
#include "polar/option.h"

/*
 * Raises the error for a bad value.  value is NULL where it might hold a
 * secret; detail and hint are full sentences, each may be NULL.
 */
void
abp_option_refuse(const char *option, const char *value, const char *detail,
				  const char *hint)
{
	ereport(ERROR,
			(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
			 value != NULL ?
			 errmsg("invalid value for option \"%s\": \"%s\"", option, value) :
			 errmsg("invalid value for option \"%s\"", option),
			 detail != NULL ? errdetail("%s", detail) : 0,
			 hint != NULL ? errhint("%s", hint) : 0));
}

/* Returns the choices as words for a hint: "a", "b", "c". */
char	   *
abp_option_choices(const char *const *choices)
{
	StringInfoData buf;

	initStringInfo(&buf);
	for (int i = 0; choices[i] != NULL; i++)
		appendStringInfo(&buf, "%s\"%s\"", i > 0 ? ", " : "", choices[i]);
	return buf.data;
}

/* Returns the position of the option's value in choices; raises if absent. */
int
abp_option_choice(DefElem *def, const char *const *choices)
{
	const char *value = defGetString(def);

	for (int i = 0; choices[i] != NULL; i++)
	{
		if (strcmp(value, choices[i]) == 0)
			return i;
	}
	abp_option_refuse(def->defname, value, NULL,
					  psprintf("Valid values are: %s.", abp_option_choices(choices)));
	return -1;					/* keep compiler quiet */
}

/*
 * Returns the option's value as an integer from min to max.  flags is one of
 * GUC_UNIT_..., or 0 for a plain count; range says min and max in words.
 */
int
abp_option_int(DefElem *def, int flags, int min, int max, const char *range)
{
	const char *value = defGetString(def);
	const char *message = NULL;
	const char *hint = psprintf("It must be %s.", range);
	int			result;

	/* parse_int rounds and knows hexadecimal: not what a count should be */
	if (flags == 0 &&
		(*value == '\0' || strspn(value, "0123456789") != strlen(value)))
		abp_option_refuse(def->defname, value, "It is not a whole number.",
						  hint);
	if (!parse_int(value, &result, flags, &message))
		abp_option_refuse(def->defname, value, message, hint);
	if (result < min || result > max)
		abp_option_refuse(def->defname, value, "It is out of range.", hint);
	return result;
}

/* Returns the option's value; raises if it is empty. */
const char *
abp_option_text(DefElem *def)
{
	const char *value = defGetString(def);

	if (*value == '\0')
		abp_option_refuse(def->defname, value, "It is empty.",
						  "Give a value, or drop the option.");
	return value;
}

/* Returns the option's value as the absolute path of a file on the server. */
const char *
abp_option_path(DefElem *def)
{
	const char *path = defGetString(def);

	if (!is_absolute_path(path))
		abp_option_refuse(def->defname, NULL, "It is not an absolute path.",
						  "Give the whole path of a file on the database server.");
	if (strlen(path) >= MAXPGPATH)
		abp_option_refuse(def->defname, NULL, "The path is too long.",
						  psprintf("It must be shorter than %d bytes.",
								   MAXPGPATH));
	for (const char *p = path; *p != '\0'; p++)
	{
		if ((unsigned char) *p < ' ' || *p == 0x7f)
			abp_option_refuse(def->defname, NULL,
							  "The path contains a control character.", NULL);
	}
	return path;
}

/* Returns the option's value as a literal event name or a template of one. */
const char *
abp_option_event_name(DefElem *def)
{
	static const char *const fields[] = {"{provider}", "{model}"};
	const char *name = abp_option_text(def);
	const char *p = name;
	int			chars = pg_mbstrlen(name);

	/* no character of a server encoding has a brace as one of its bytes */
	while (*p != '\0')
	{
		int			field_len = 0;

		for (int i = 0; i < lengthof(fields); i++)
		{
			if (strncmp(p, fields[i], strlen(fields[i])) == 0)
				field_len = strlen(fields[i]);
		}
		if (field_len == 0 && (*p == '{' || *p == '}'))
			abp_option_refuse(def->defname, name,
							  "Braces may only stand around the name of a field.",
							  "Valid fields are: {provider}, {model}.");
		chars -= field_len;
		p += Max(field_len, 1);
	}
	if (chars > MAX_NAME_CHARS)
		abp_option_refuse(def->defname, name,
						  "Polar refuses such a long event name.",
						  psprintf("It must not be longer than %d characters.",
								   MAX_NAME_CHARS));
	return name;
}

/* Returns the option's value as what is put before a tag's name. */
const char *
abp_option_tag_prefix(DefElem *def)
{
	const char *prefix = defGetString(def);
	size_t		len = strlen(prefix);

	if (pg_mbstrlen(prefix) >= MAX_KEY_CHARS)
		abp_option_refuse(def->defname, prefix,
						  psprintf("Polar refuses metadata keys over %d characters, and the tag's name follows the prefix.",
								   MAX_KEY_CHARS),
						  NULL);
	for (int i = 0; i < NUM_OWN_KEYS; i++)
	{
		if (strncmp(prefix, abp_own_keys[i].data, len) == 0)
			abp_option_refuse(def->defname, prefix,
							  psprintf("A tag \"%s\" would be sent as \"%s\", a name of the extension's own.",
									   abp_own_keys[i].data + len,
									   abp_own_keys[i].data),
							  "Choose another prefix, such as \"" DEFAULT_TAG_PREFIX "\".");
	}
	return prefix;
}

/* Returns the option's value as two strings: schema and function name. */
List	   *
abp_option_function_name(DefElem *def)
{
	const char *value = defGetString(def);
	List	   *names;

	if (strchr(value, '"') == NULL && strchr(value, '(') != NULL)
		abp_option_refuse(def->defname, value, "It is not a function's name.",
						  "Give the name without arguments: schema.function.");
	if (!SplitIdentifierString(pstrdup(value), '.', &names) ||
		list_length(names) != 2)
		abp_option_refuse(def->defname, value,
						  "It is not a schema-qualified name.",
						  "Give schema and function: schema.function.");
	return names;
}

/*
 * Returns what is wrong with a token, as the end of a sentence that starts
 * with what holds it, or NULL if it could be one.
 */
const char *
abp_option_token_fault(const char *token, size_t len)
{
	if (len == 0)
		return "is empty";
	if (len > MAX_TOKEN_BYTES)
		return "is longer than 4 kB";
	/* as shells and .env files have it */
	if (token[0] == '"' || token[0] == '\'')
		return "is in quotes";
	if (len > strlen("Bearer ") && pg_strncasecmp(token, "Bearer ", strlen("Bearer ")) == 0)
		return "begins with \"Bearer\"";
	for (size_t i = 0; i < len && (isalnum((unsigned char) token[i]) || token[i] == '_'); i++)
	{
		/* not at the end, where base64 has it */
		if (i + 2 < len && token[i + 1] == '=' && token[i + 2] != '=')
			return "begins with a name and \"=\"";
	}
	for (size_t i = 0; i < len; i++)
	{
		/* a line break would let the token write headers of its own */
		if (token[i] <= ' ' || token[i] >= 0x7f)
			return "contains a blank, a control character or a character outside ASCII";
	}
	return NULL;
}
