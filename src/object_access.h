/*-------------------------------------------------------------------------
 *
 * object_access.h
 *	  PostgreSQL's object access hook: what commands do to our objects.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_OBJECT_ACCESS_H
#define ABP_OBJECT_ACCESS_H

extern void abp_object_access_init(void);

#endif							/* ABP_OBJECT_ACCESS_H */
