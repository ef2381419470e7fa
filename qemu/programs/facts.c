/*
 * Copies what the running kernel says about itself (files of /proc and /sys)
 * below a directory, at the same paths: the truth that tests compare with.
 * A program and not a script because the guest is emulated and forks slowly.
 *
 *   facts DIRECTORY
 */
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <limits.h>
#include <sys/stat.h>

#include "planted.h"

static const char *const system_files[] = {
	"/proc/buddyinfo",    "/proc/cgroups",     "/proc/cmdline",        "/proc/consoles",
	"/proc/cpuinfo",      "/proc/crypto",      "/proc/devices",        "/proc/diskstats",
	"/proc/filesystems",  "/proc/interrupts",  "/proc/iomem",          "/proc/ioports",
	"/proc/kallsyms",     "/proc/keys",        "/proc/loadavg",        "/proc/locks",
	"/proc/meminfo",      "/proc/misc",        "/proc/modules",        "/proc/mounts",
	"/proc/pagetypeinfo", "/proc/partitions",  "/proc/sched_debug",    "/proc/schedstat",
	"/proc/self/mountinfo", "/proc/slabinfo",  "/proc/softirqs",       "/proc/stat",
	"/proc/swaps",        "/proc/sysvipc/msg", "/proc/sysvipc/sem",    "/proc/sysvipc/shm",
	"/proc/timer_list",   "/proc/tty/drivers", "/proc/uptime",         "/proc/version",
	"/proc/vmallocinfo",  "/proc/vmstat",      "/proc/zoneinfo",
	"/proc/sys/kernel/hostname", "/proc/sys/kernel/osrelease", "/proc/sys/kernel/pid_max",
	"/proc/sys/kernel/random/boot_id", "/proc/sys/kernel/tainted",
	"/sys/kernel/btf/vmlinux", "/sys/kernel/debug/sched/debug", "/sys/kernel/notes",
	"/sys/kernel/vmcoreinfo",
};

/* Every file of these, with no directories below them. */
static const char *const system_directories[] = {
	"/proc/net", "/sys/kernel/slab/kstub_cache", "/sys/kernel/slab/kstub_constructed",
};

/* Of every module that is loaded. */
static const char *const module_files[] = {
	"coresize", "initsize", "initstate", "refcnt", "taint", "notes/.note.gnu.build-id",
};

static const char *const process_files[] = {
	"auxv", "cgroup", "cmdline", "comm", "environ", "io", "limits", "maps", "mountinfo", "smaps",
	"stat", "status",
};

static const char *const thread_files[] = {
	"comm", "sched", "stack", "stat", "status", "syscall", "wchan",
};

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

static const char *root;
static FILE *task_list;

static void make_parents(char *path)
{
	for (char *slash = path + strlen(root) + 1; (slash = strchr(slash, '/')); slash++) {
		*slash = '\0';
		mkdir(path, 0755);
		*slash = '/';
	}
}

/* A file this kernel does not have, or a task that is gone, is no error. */
static void copy(const char *from)
{
	static char buffer[1 << 16];
	char to[PATH_MAX];
	int source = open(from, O_RDONLY), target;
	ssize_t length;

	if (source < 0)
		return;
	snprintf(to, sizeof(to), "%s%s", root, from);
	make_parents(to);
	target = open(to, O_WRONLY | O_CREAT | O_TRUNC, 0644);
	CHECK(target >= 0);
	while ((length = read(source, buffer, sizeof(buffer))) > 0)
		CHECK(write(target, buffer, length) == length);
	close(source);
	close(target);
}

static void copy_below(const char *directory, const char *const *names, size_t count)
{
	char path[PATH_MAX];

	for (size_t i = 0; i < count; i++) {
		snprintf(path, sizeof(path), "%s/%s", directory, names[i]);
		copy(path);
	}
}

/* What is no regular file, or cannot be read, is left out. */
static void copy_directory(const char *directory)
{
	char path[PATH_MAX];
	struct dirent *entry;
	struct stat facts;
	DIR *stream = opendir(directory);

	if (!stream)
		return;
	while ((entry = readdir(stream))) {
		snprintf(path, sizeof(path), "%s/%s", directory, entry->d_name);
		if (stat(path, &facts) == 0 && S_ISREG(facts.st_mode) && facts.st_mode & 0444)
			copy(path);
	}
	closedir(stream);
}

static void copy_modules(void)
{
	char path[PATH_MAX - 64], sections[PATH_MAX];
	struct dirent *entry;
	DIR *stream = opendir("/sys/module");

	if (!stream)
		return;
	while ((entry = readdir(stream))) {
		snprintf(path, sizeof(path), "/sys/module/%s", entry->d_name);
		snprintf(sections, sizeof(sections), "%s/sections", path);
		if (entry->d_name[0] == '.' || access(sections, R_OK))
			continue;
		copy_below(path, module_files, COUNT(module_files));
		copy_directory(sections);
	}
	closedir(stream);
}

static void for_each_number(const char *directory, void (*visit)(const char *, long))
{
	DIR *stream = opendir(directory);
	struct dirent *entry;

	if (!stream)
		return;
	while ((entry = readdir(stream)))
		if (isdigit((unsigned char)entry->d_name[0]))
			visit(directory, atol(entry->d_name));
	closedir(stream);
}

/* One line a thread: what `ps` shows, taken from its stat file. */
static void list_task(const char *directory, long tid)
{
	char path[PATH_MAX], line[1024], state;
	int ppid, pid = -1;
	char *open_bracket, *close_bracket;
	FILE *file;

	sscanf(directory, "/proc/%d/", &pid);
	snprintf(path, sizeof(path), "%s/%ld/stat", directory, tid);
	file = fopen(path, "r");
	if (!file)
		return;
	if (fgets(line, sizeof(line), file) && (open_bracket = strchr(line, '(')) &&
	    (close_bracket = strrchr(line, ')')) &&
	    sscanf(close_bracket + 1, " %c %d", &state, &ppid) == 2) {
		*close_bracket = '\0';
		fprintf(task_list, "%ld %d %d %c %s\n", tid, pid, ppid, state, open_bracket + 1);
	}
	fclose(file);
}

static void visit_thread(const char *directory, long tid)
{
	char path[PATH_MAX];

	list_task(directory, tid);
	snprintf(path, sizeof(path), "%s/%ld", directory, tid);
	copy_below(path, thread_files, COUNT(thread_files));
}

static void list_files(const char *process)
{
	char path[PATH_MAX + 64], target[PATH_MAX], list[PATH_MAX];
	struct dirent *entry;
	DIR *stream;
	FILE *out;

	snprintf(path, sizeof(path), "%s/fd", process);
	stream = opendir(path);
	if (!stream)
		return;
	snprintf(list, sizeof(list), "%s%s/fd.txt", root, process);
	out = fopen(list, "w");
	CHECK(out);
	while ((entry = readdir(stream))) {
		ssize_t length;

		snprintf(path, sizeof(path), "%s/fd/%s", process, entry->d_name);
		length = readlink(path, target, sizeof(target));
		if (length > 0)
			fprintf(out, "%s %.*s\n", entry->d_name, (int)length, target);
	}
	fclose(out);
	closedir(stream);
}

static void visit_process(const char *directory, long pid)
{
	char path[PATH_MAX];

	snprintf(path, sizeof(path), "%s/%ld", directory, pid);
	copy_below(path, process_files, COUNT(process_files));
	list_files(path);
	snprintf(path, sizeof(path), "%s/%ld/task", directory, pid);
	for_each_number(path, visit_thread);
}

int main(int argc, char **argv)
{
	char path[PATH_MAX];

	if (argc != 2) {
		fprintf(stderr, "usage: facts DIRECTORY\n");
		return 2;
	}
	root = argv[1];
	for (size_t i = 0; i < COUNT(system_files); i++)
		copy(system_files[i]);
	for (size_t i = 0; i < COUNT(system_directories); i++)
		copy_directory(system_directories[i]);
	copy_modules();
	snprintf(path, sizeof(path), "%s/tasks.txt", root);
	task_list = fopen(path, "w");
	CHECK(task_list);
	fprintf(task_list, "# tid pid ppid state comm\n");
	for_each_number("/proc", visit_process);
	fclose(task_list);
}
